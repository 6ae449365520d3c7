"""Pictures out of noise alone, with no text and in the pixels themselves: the pipelines of three papers."""

from typing import Any

import torch

from ..checks import as_integer
from ..images import check_output_type, to_output
from ..models import UNet2DModel
from ..noise import Generators, randn_tensor
from ..schedulers import DDIMScheduler, PNDMScheduler
from ..schedulers.base import Sampler
from .base import DiffusionPipeline, ImageOutput
from .denoise import denoise, plan


class UnconditionalPipeline(DiffusionPipeline):
    def __init__(self, unet: UNet2DModel, scheduler: Sampler):
        self.register_modules(unet=unet, scheduler=scheduler)

    def sample(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        output_type: str,
        return_dict: bool,
        /,  # so that step_options may have a generator too
        **step_options: Any,
    ) -> ImageOutput | tuple:
        """Draws noise and denoises it; `step_options` go to the scheduler's `step`."""
        check_output_type(output_type, ("pil", "np", "pt"))
        batch_size = as_integer(batch_size, "batch_size")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        config = self.unet.config
        if output_type == "pil" and config.out_channels not in (1, 3, 4):
            raise ValueError(f'output_type="pil" takes 1, 3 or 4 channels; this unet makes {config.out_channels}: "pt"')
        if config.sample_size is None:
            raise ValueError("the unet's config has no sample_size, so the size of the pictures isn't known")
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
        with self.running() as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            shape = (batch_size, config.in_channels, *size)
            sample = randn_tensor(shape, generator, run._execution_device, run.unet.dtype)
            sample = denoise(run, {"latents": sample}, timesteps, **step_options)
            images = to_output(sample, output_type)
        output = ImageOutput(images)
        return output if return_dict else tuple(output)


class DDPMPipeline(UnconditionalPipeline):
    """Denoising diffusion probabilistic models (Ho et al., arXiv 2006.11239), algorithm 2: sampling."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures. `output_type`: "pil"; "np", (B, H, W, C) in [0, 1]; "pt", (B, C, H, W) in [0, 1]."""
        return self.sample(batch_size, generator, num_inference_steps, output_type, return_dict, generator=generator)


class DDIMPipeline(UnconditionalPipeline):
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502): the DDPM's network, in fewer steps."""

    def __init__(self, unet: UNet2DModel, scheduler: Sampler):
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


class PNDMPipeline(UnconditionalPipeline):
    """Pseudo numerical methods for diffusion models on manifolds (Liu et al., arXiv 2202.09778), algorithm 2."""

    def __init__(self, unet: UNet2DModel, scheduler: Sampler):
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
