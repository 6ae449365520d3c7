"""Pictures out of noise in the pixels, by loops of their own: each step asks the network more than once.

These samplers go by noise levels, or back as well as forth; `denoise` is for those that take one step for each
timestep.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checks import as_integer, check_number, check_tensors
from ..image_processor import PipelineImageInput, VaeImageProcessor
from ..images import check_output_type, to_output
from ..models import UNet2DModel
from ..noise import Generators, randn_tensor
from ..schedulers import KarrasVeScheduler, RePaintScheduler, ScoreSdeVeScheduler
from .base import DiffusionPipeline, ImageOutput
from .denoise import check_finite
from .latents import check_generators

OUTPUTS = ("pil", "np", "pt")


class InPixels(DiffusionPipeline):
    """What the three have in common: the checks, and the end."""

    def shape(self, batch_size: int, output_type: str) -> tuple[int, ...]:
        check_output_type(output_type, OUTPUTS)
        batch_size = as_integer(batch_size, "batch_size")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        config = self.unet.config
        if config.sample_size is None:
            raise ValueError("the unet's config has no sample_size, so the size of the pictures isn't known")
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
        return batch_size, config.in_channels, *size

    def finish(self, pictures: Tensor, output_type: str, return_dict: bool) -> ImageOutput | tuple:
        """Pictures in [-1, 1] -> what the call returns."""
        result = ImageOutput(to_output(pictures, output_type))
        return result if return_dict else tuple(result)


class ScoreSdeVePipeline(InPixels):
    """Score-based generative modeling through stochastic differential equations (Song et al., arXiv 2011.13456),
    algorithm 2: predictor and corrector, for the SDE whose variance explodes."""

    def __init__(self, unet: UNet2DModel, scheduler: ScoreSdeVeScheduler):
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 2000,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures, each step of which asks the network `correct_steps` + 1 times.

        `output_type`: "pil"; "np", (B, H, W, C) in [0, 1]; "pt", (B, C, H, W) in [0, 1].
        """
        shape, finite = self.shape(batch_size, output_type), []
        check_generators(generator, shape[0])
        with self.running() as run:
            scheduler, device, dtype = run.scheduler, run._execution_device, run.unet.dtype
            scheduler.set_timesteps(num_inference_steps)
            scheduler.set_sigmas(num_inference_steps)
            x = (randn_tensor(shape, generator, device, dtype) * scheduler.init_noise_sigma).to(device)
            for i, t in enumerate(run.progress_bar(scheduler.timesteps)):
                sigma = scheduler.sigmas[i].to(device, dtype).expand(shape[0])
                for _ in range(scheduler.config.correct_steps):
                    x = scheduler.step_correct(run.unet(x, sigma).sample, x, generator=generator).prev_sample
                x, mean = scheduler.step_pred(run.unet(x, sigma).sample, t, x, generator=generator)
                finite.append(x.isfinite().all())
            check_finite(finite, scheduler.timesteps)
        return self.finish(2 * mean.clamp(0, 1) - 1, output_type, return_dict)  # this network's pictures are in [0, 1]


class KarrasVePipeline(InPixels):
    """Elucidating the design space of diffusion-based generative models (Karras et al., arXiv 2206.00364),
    algorithm 2: stochastic, by Heun's method."""

    def __init__(self, unet: UNet2DModel, scheduler: KarrasVeScheduler):
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures, in 2 `num_inference_steps` - 1 passes. `output_type` as in ScoreSdeVePipeline."""
        shape, finite = self.shape(batch_size, output_type), []
        check_generators(generator, shape[0])
        with self.running() as run:
            scheduler, device, dtype = run.scheduler, run._execution_device, run.unet.dtype
            scheduler.set_timesteps(num_inference_steps)

            def minus_eps(x: Tensor, sigma: Tensor) -> Tensor:
                """The network was trained on pictures in [0, 1], where all noise is half as large."""
                return sigma / 2 * run.unet((x + 1) / 2, sigma / 2).sample

            x = randn_tensor(shape, generator, device, dtype) * scheduler.init_noise_sigma
            for t in run.progress_bar(scheduler.timesteps):
                sigma = scheduler.schedule[t]
                sigma_next = scheduler.schedule[t - 1] if t > 0 else 0
                x_hat, sigma_hat = scheduler.add_noise_to_input(x, sigma, generator=generator)
                stepped = scheduler.step(minus_eps(x_hat, sigma_hat), sigma_hat, sigma_next, x_hat)
                if sigma_next != 0:
                    ahead = minus_eps(stepped.prev_sample, sigma_next)
                    levels = (sigma_hat, sigma_next, x_hat)
                    stepped = scheduler.step_correct(ahead, *levels, stepped.prev_sample, stepped.derivative)
                x = stepped.prev_sample
                finite.append(x.isfinite().all())
            check_finite(finite, scheduler.timesteps)
        return self.finish(x, output_type, return_dict)


class RePaintPipeline(InPixels):
    """RePaint: inpainting using denoising diffusion probabilistic models (Lugmayr et al., arXiv 2201.09865),
    algorithm 1: any network of the DDPM paper's kind paints what a mask hides."""

    def __init__(self, unet: UNet2DModel, scheduler: RePaintScheduler):
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        num_inference_steps: int = 250,
        eta: float = 0.0,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`image` where `mask_image` is white (1), painted anew where it is black (0).

        Args:
            image: PIL images of one size, of which sides are made multiples of 8; or tensors (B, C, H, W) in [-1, 1].
            mask_image: PIL images, of which sides are made multiples of 32; or tensors (B or 1, 1, H, W), 0 and 1.
            eta: 0 is DDIM's, 1 is DDPM's.
            jump_length, jump_n_sample: each so many steps are walked so many times. `output_type` as elsewhere.
            generator: of a list, each draws its picture's first noise, and the first one everything else.
        """
        check_output_type(output_type, OUTPUTS)
        check_number(eta, "eta", least=0)
        known, mask = _pictures("image", image, 8), _pictures("mask_image", mask_image, 32)
        if len(mask.shape) == 3:
            mask = mask[:, None]
        if known.shape[1] != self.unet.config.in_channels or known.shape[2:] != mask.shape[2:] or mask.shape[1] != 1:
            raise ValueError(
                f"image has shape {tuple(known.shape)}, mask_image {tuple(mask.shape)} as tensors: they must be"
                f" (B, {self.unet.config.in_channels}, H, W) and (B or 1, 1, H, W). PIL masks come in multiples of 32"
            )
        check_generators(generator, len(known))
        finite = []
        with self.running() as run:
            scheduler, device, dtype = run.scheduler, run._execution_device, run.unet.dtype
            known, mask = known.to(device, dtype), mask.to(device, dtype)
            x = randn_tensor(tuple(known.shape), generator, device, dtype)
            scheduler.set_timesteps(num_inference_steps, jump_length, jump_n_sample)
            scheduler.eta = eta
            last = scheduler.timesteps[0] + 1
            one = generator[0] if isinstance(generator, list | tuple) else generator
            for t in run.progress_bar(scheduler.timesteps):
                if t < last:
                    predicted = run.unet(x, t.to(device)).sample
                    x = scheduler.step(predicted, t, x, known, mask, one).prev_sample
                else:
                    x = scheduler.undo_step(x, last, one)
                last = t
                finite.append(x.isfinite().all())
            check_finite(finite, scheduler.timesteps)
        return self.finish(x, output_type, return_dict)


def _pictures(name: str, given: Any, factor: int) -> Tensor:
    """As tensors: tensors stay as they are, PIL images go to [-1, 1], masks to 0 and 1."""
    images = list(given) if isinstance(given, list | tuple) else [given]
    if images and all(isinstance(image, Image.Image) for image in images):
        is_mask = name == "mask_image"
        kind = {"do_normalize": False, "do_binarize": True, "resample": "nearest"} if is_mask else {}
        images = [image.convert("L") for image in images] if is_mask else images
        return VaeImageProcessor(vae_scale_factor=factor, **kind).preprocess(images)
    for image in images:
        check_tensors(**{name: image})
    return torch.cat(images)
