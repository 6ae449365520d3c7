"""The first latent diffusion models (High-resolution image synthesis with latent diffusion models, arXiv 2112.10752):
faces out of noise alone, and pictures of four times the size. Latents come out of a codebook (VQModel)."""

import torch
from PIL import Image
from torch import Tensor

from ..checks import as_integer, check_number, check_tensors
from ..image_processor import VaeImageProcessor
from ..images import check_output_type, to_output
from ..models import UNet2DModel, VQModel
from ..noise import Generators
from ..schedulers.base import Scheduler
from .base import DiffusionPipeline, ImageOutput
from .denoise import denoise, plan
from .latents import first_latents
from .memory import device_of

IN_PIXELS = ("pil", "np", "pt")


class LDMPipeline(DiffusionPipeline):
    """Section 4.1: pictures out of noise alone."""

    def __init__(self, vqvae: VQModel, unet: UNet2DModel, scheduler: Scheduler):
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures. `eta` is DDIM's; its noise is torch's own, and not `generator`'s.

        `output_type`: "pil"; "np", (B, H, W, C) in [0, 1]; "pt", (B, C, H, W) in [0, 1].
        """
        check_output_type(output_type, IN_PIXELS)
        check_number(eta, "eta", least=0)
        batch_size = as_integer(batch_size, "batch_size")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        if size is None:
            raise ValueError("the unet's config has no sample_size, so the size of the pictures isn't known")
        shape = (batch_size, channels, *(size if isinstance(size, tuple) else (size, size)))
        with self.running() as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            device, dtype, sigma = run._execution_device, run.unet.dtype, run.scheduler.init_noise_sigma
            tensors = {"latents": first_latents(shape, generator, None, device, dtype, sigma)}
            latents = denoise(run, tensors, timesteps, eta=eta)
            pictures = run.vqvae.decode(
                (latents / run.vqvae.config.scaling_factor).to(device_of(run.vqvae), run.vqvae.dtype)
            ).sample
        result = ImageOutput(to_output(pictures, output_type))
        return result if return_dict else tuple(result)


class LDMSuperResolutionPipeline(DiffusionPipeline):
    """Section 4.4: four times the size. The UNet sees the small picture beside the latents, which are of its size."""

    def __init__(self, vqvae: VQModel, unet: UNet2DModel, scheduler: Scheduler):
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)
        if unet.config.in_channels != 2 * vqvae.config.latent_channels:
            raise ValueError(
                f"unet has {unet.config.in_channels} input channels, but must have 2 x {vqvae.config.latent_channels},"
                " for the latents and the small picture"
            )

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | Tensor,
        batch_size: int = 1,
        num_inference_steps: int = 100,
        eta: float = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """The large picture for a small one.

        `image`: a PIL image, whose sides are made multiples of 32; or tensors (B, 3, H, W) in [-1, 1]. They say how
        many there are: `batch_size` isn't read. `eta`'s noise is torch's own, and not `generator`'s.
        """
        check_output_type(output_type, IN_PIXELS)
        check_number(eta, "eta", least=0)
        if isinstance(image, Image.Image):
            small = VaeImageProcessor(vae_scale_factor=32, do_convert_rgb=True).preprocess(image)
        else:
            check_tensors(image=image)
            small = image
        channels, factor = self.unet.config.in_channels // 2, self.unet.factor
        if small.ndim != 4 or small.shape[1] != channels or any(side % factor or not side for side in small.shape[2:]):
            raise ValueError(
                f"image has shape {tuple(small.shape)}, but must be (batch, {channels}, height, width), with sides that"
                f" are multiples of {factor}"
            )
        with self.running() as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            device, dtype, sigma = run._execution_device, run.unet.dtype, run.scheduler.init_noise_sigma
            tensors = {"latents": first_latents(tuple(small.shape), generator, None, device, dtype, sigma)}
            small, places = small.to(device, dtype), iter(timesteps)

            def beside(tensors: dict[str, Tensor]) -> list[Tensor]:
                """The reference scales the picture too, where a sampler scales latents: it should be left alone."""
                return [run.scheduler.scale_model_input(small, next(places))]

            latents = denoise(run, tensors, timesteps, beside=beside, eta=eta)
            # No scaling factor: the super-resolution model was trained on latents as they are
            pictures = run.vqvae.decode(latents.to(device_of(run.vqvae), run.vqvae.dtype)).sample
        result = ImageOutput(to_output(pictures, output_type))
        return result if return_dict else tuple(result)
