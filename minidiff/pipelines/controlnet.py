"""Stable Diffusion steered by a picture of edges, depth, a pose, ...: ControlNet (arXiv 2302.05543). See control.py."""

from typing import Any

from torch import Tensor

from ..image_processor import PipelineImageInput
from ..noise import Generators
from .control import ControlImage, Controlled, ControlledInpainting, Numbers, taking, with_controlnet
from .image_to_image import StableDiffusionImg2ImgPipeline
from .inpaint import StableDiffusionInpaintPipeline
from .latents import first_noise
from .stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput
from .text_to_image import StableDiffusionPipeline


class StableDiffusionControlNetPipeline(Controlled, StableDiffusionPipeline):
    """Text to image, for SD 1.x and 2.x."""

    _callback_tensor_inputs = (*StableDiffusion._callback_tensor_inputs, "image")
    control_name = "image"
    __init__ = with_controlnet(StableDiffusionPipeline)

    @taking(StableDiffusionPipeline)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ControlImage | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        *,
        controlnet_conditioning_scale: Numbers = 1.0,
        guess_mode: bool = False,
        control_guidance_start: Numbers = 0.0,
        control_guidance_end: Numbers = 1.0,
        **others: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws as `StableDiffusionPipeline`, whose other arguments, and errors, these are.

        Args:
            image: the control picture, or a list with one for each prompt; for several nets a list with a picture for
                each, or a list of such lists, one for each prompt.
            height, width: of all pictures; by default the control picture's, down to multiples of the VAE's factor.
            controlnet_conditioning_scale: how strongly the nets steer; one number, or a list with one for each.
            guess_mode: the nets steer the pass with the prompt alone, and do so the less, the earlier in the UNet.
            control_guidance_start, control_guidance_end: the part of the run in which the nets steer, from 0 to 1; a
                number, or a list with one for each.
        """
        options = (controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end)
        view = self.controlled(image, height, width, *options)
        return StableDiffusionPipeline.__call__(view, prompt, *view._control.size, num_inference_steps, **others)


class StableDiffusionControlNetImg2ImgPipeline(Controlled, StableDiffusionImg2ImgPipeline):
    """A picture and a text to a picture, for SD 1.x and 2.x."""

    _callback_tensor_inputs = (*StableDiffusion._callback_tensor_inputs, "control_image")
    __init__ = with_controlnet(StableDiffusionImg2ImgPipeline)
    _latents: Tensor | None

    @taking(StableDiffusionImg2ImgPipeline)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        control_image: ControlImage | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        *,
        latents: Tensor | None = None,
        controlnet_conditioning_scale: Numbers = 0.8,
        guess_mode: bool = False,
        control_guidance_start: Numbers = 0.0,
        control_guidance_end: Numbers = 1.0,
        **others: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws as `StableDiffusionImg2ImgPipeline`, whose other arguments, and errors, these are.

        `control_image` and what follows are those of `StableDiffusionControlNetPipeline`; `image` is made as large.
        `latents`: in place of what would be made of `image`, already at the noise of the first step.
        """
        options = (controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end)
        view = self.controlled(control_image, height, width, *options, _latents=latents)
        return StableDiffusionImg2ImgPipeline.__call__(view, prompt, image, strength, num_inference_steps, **others)

    def first_latents(self, pictures: Tensor, B: int, timestep: Tensor, generator: Generators) -> Tensor:
        if self._latents is None:
            return super().first_latents(pictures, B, timestep, generator)
        shape = (B, self.vae.config.latent_channels, *(side // self.vae.factor for side in self._control.size))
        return first_noise(shape, generator, self._latents, self._execution_device, self.unet.dtype)


class StableDiffusionControlNetInpaintPipeline(ControlledInpainting, StableDiffusionInpaintPipeline):
    """A part of a picture drawn anew, for SD 1.x and 2.x, with a UNet of 9 or 4 channels."""

    _callback_tensor_inputs = (*StableDiffusionInpaintPipeline._callback_tensor_inputs, "control_image")
    __init__ = with_controlnet(StableDiffusionInpaintPipeline)

    @taking(StableDiffusionInpaintPipeline)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        control_image: ControlImage | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        *,
        output_type: str = "pil",
        controlnet_conditioning_scale: Numbers = 0.5,
        guess_mode: bool = False,
        control_guidance_start: Numbers = 0.0,
        control_guidance_end: Numbers = 1.0,
        **others: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Draws as `StableDiffusionInpaintPipeline`, whose other arguments, and errors, these are.

        `control_image` and what follows are those of `StableDiffusionControlNetPipeline`; `image` and `mask_image` are
        made as large. With `padding_mask_crop` the control picture is cropped as they are.
        """
        options = (controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end)
        crop = (image, mask_image, padding_mask_crop, output_type)
        view = self.controlled_part(control_image, height, width, options, *crop)
        leading = (prompt, image, mask_image, None, *view._control.size, padding_mask_crop, strength)
        others |= {"output_type": output_type}
        return StableDiffusionInpaintPipeline.__call__(view, *leading, num_inference_steps, **others)
