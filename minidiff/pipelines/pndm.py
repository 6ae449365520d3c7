"""Pseudo numerical methods for diffusion models on manifolds (Liu et al., arXiv 2202.09778), algorithm 2."""

import torch

from ..noise import Generators
from ..pipeline import ImageOutput
from ..schedulers import PNDMScheduler
from ..schedulers.base import Scheduler
from ..unet import UNet2DModel
from .unconditional import UnconditionalPipeline


class PNDMPipeline(UnconditionalPipeline):
    def __init__(self, unet: UNet2DModel, scheduler: Scheduler):
        super().__init__(unet, scheduler)
        self.scheduler = PNDMScheduler.from_config(scheduler.config)  # folders often hold DDPM's

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures, in `num_inference_steps` + 9 passes (PRK). `output_type` as in DDPMPipeline."""
        return self.sample(batch_size, generator, num_inference_steps, output_type, return_dict)
