"""Stable Diffusion XL steered by a picture: ControlNet (arXiv 2302.05543). See control.py."""

from typing import Any

from ..image_processor import PipelineImageInput
from .control import ControlImage, Controlled, ControlledInpainting, Numbers, taking, with_controlnet
from .latents import LatentsAs
from .stable_diffusion_xl import StableDiffusionXLPipelineOutput
from .xl import StableDiffusionXLPipeline
from .xl_image_to_image import StableDiffusionXLImg2ImgPipeline
from .xl_inpaint import StableDiffusionXLInpaintPipeline


class StableDiffusionXLControlNetPipeline(Controlled, StableDiffusionXLPipeline):
    """Text to image."""

    _callback_tensor_inputs = (*StableDiffusionXLPipeline._callback_tensor_inputs, "image")
    control_name = "image"
    __init__ = with_controlnet(StableDiffusionXLPipeline)

    @taking(StableDiffusionXLPipeline)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
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
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws as `StableDiffusionXLPipeline`, whose other arguments, and errors, these are.

        `image`, `height`, `width` and what follows are those of `StableDiffusionControlNetPipeline`. The part of the
        run in which the nets steer is counted in the whole grid's steps, whatever `denoising_end`.
        """
        options = (controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end)
        view = self.controlled(image, height, width, *options)
        leading = (prompt, prompt_2, *view._control.size, num_inference_steps)
        return StableDiffusionXLPipeline.__call__(view, *leading, **others)


class StableDiffusionXLControlNetImg2ImgPipeline(Controlled, StableDiffusionXLImg2ImgPipeline):
    """A picture and a text to a picture."""

    _callback_tensor_inputs = (*StableDiffusionXLImg2ImgPipeline._callback_tensor_inputs, "control_image")
    __init__ = with_controlnet(StableDiffusionXLImg2ImgPipeline)

    @taking(StableDiffusionXLImg2ImgPipeline)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        control_image: ControlImage | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        *,
        controlnet_conditioning_scale: Numbers = 0.8,
        guess_mode: bool = False,
        control_guidance_start: Numbers = 0.0,
        control_guidance_end: Numbers = 1.0,
        **others: Any,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws as `StableDiffusionXLImg2ImgPipeline`, whose other arguments, and errors, these are.

        `control_image`, `height`, `width` and what follows are those of `StableDiffusionControlNetImg2ImgPipeline`.
        """
        options = (controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end)
        view = self.controlled(control_image, height, width, *options)
        leading = (prompt, prompt_2, image, strength, num_inference_steps)
        return StableDiffusionXLImg2ImgPipeline.__call__(view, *leading, **others)


class StableDiffusionXLControlNetInpaintPipeline(ControlledInpainting, StableDiffusionXLInpaintPipeline):
    """A part of a picture drawn anew, with a UNet of 9 or 4 channels."""

    _callback_tensor_inputs = (*StableDiffusionXLInpaintPipeline._callback_tensor_inputs, "control_image")
    # Two things that the reference has elsewhere and leaves out here: the VAE's `latents_mean` and `latents_std`, and
    # that nets with `global_pool_conditions` steer the pass with the prompt alone
    latents_as = LatentsAs(upcast=True)
    pooling_guesses = False
    __init__ = with_controlnet(StableDiffusionXLInpaintPipeline)

    @taking(StableDiffusionXLInpaintPipeline)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        control_image: ControlImage | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        *,
        guidance_scale: float = 5.0,
        output_type: str = "pil",
        controlnet_conditioning_scale: Numbers = 1.0,
        guess_mode: bool = False,
        control_guidance_start: Numbers = 0.0,
        control_guidance_end: Numbers = 1.0,
        **others: Any,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        """Draws as `StableDiffusionXLInpaintPipeline`, whose other arguments, and errors, these are.

        `control_image`, `height`, `width` and what follows are those of `StableDiffusionControlNetInpaintPipeline`.
        """
        options = (controlnet_conditioning_scale, guess_mode, control_guidance_start, control_guidance_end)
        crop = (image, mask_image, padding_mask_crop, output_type)
        view = self.controlled_part(control_image, height, width, options, *crop)
        leading = (prompt, prompt_2, image, mask_image, None, *view._control.size, padding_mask_crop, strength)
        others |= {"guidance_scale": guidance_scale, "output_type": output_type}
        return StableDiffusionXLInpaintPipeline.__call__(view, *leading, num_inference_steps, **others)
