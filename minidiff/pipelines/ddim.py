"""Denoising diffusion implicit models (Song et al., arXiv 2010.02502): the DDPM's network, in fewer steps."""

import torch

from ..noise import Generators
from ..pipeline import ImageOutput
from ..schedulers import DDIMScheduler
from ..schedulers.base import Scheduler
from ..unet import UNet2DModel
from .unconditional import UnconditionalPipeline


class DDIMPipeline(UnconditionalPipeline):
    def __init__(self, unet: UNet2DModel, scheduler: Scheduler):
        super().__init__(unet, scheduler)
        self.scheduler = DDIMScheduler.from_config(scheduler.config)  # folders often hold DDPM's

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures. `eta` 0 is deterministic, 1 is DDPM; `output_type` as in DDPMPipeline."""
        options = {"eta": eta, "use_clipped_model_output": bool(use_clipped_model_output), "generator": generator}
        return self.sample(batch_size, generator, num_inference_steps, output_type, return_dict, **options)
