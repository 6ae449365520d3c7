"""The loop that DDPM, DDIM and PNDM share: noise in, picture out, in the pixels themselves, with no text."""

from typing import Any

from ..images import check_output_type, to_output
from ..noise import Generators, randn_tensor
from ..pipeline import DiffusionPipeline, ImageOutput, check_finite
from ..schedulers.base import Scheduler
from ..unet import UNet2DModel


class UnconditionalPipeline(DiffusionPipeline):
    def __init__(self, unet: UNet2DModel, scheduler: Scheduler):
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
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a positive integer")
        config = self.unet.config
        if config.sample_size is None:
            raise ValueError("the unet's config has no sample_size, so the size of the pictures isn't known")
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
        self.scheduler.set_timesteps(num_inference_steps)
        sample = randn_tensor((batch_size, config.in_channels, *size), generator, self.device, self.unet.dtype)
        timesteps, finite = self.scheduler.timesteps.tolist(), []
        for t in self.progress_bar(timesteps):
            eps = self.unet(sample, t).sample
            sample = self.scheduler.step(eps, t, sample, **step_options).prev_sample
            finite.append(sample.isfinite().all())
        check_finite(finite, timesteps)
        output = ImageOutput(to_output(sample, output_type))
        return output if return_dict else tuple(output)
