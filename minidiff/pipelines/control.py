"""What the pipelines with a ControlNet share (arXiv 2302.05543): the checks of what they are given, and the residuals.

At each step the net sees what the UNet sees, and the control picture; what it makes is added inside the UNet. All else
is the plain pipeline's: a call is one of the plain pipeline's, by a view of the pipeline that knows the control.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn

from ..checks import as_integer, check_number
from ..image_processor import PipelineImageInput, VaeImageProcessor
from ..models import ControlNetModel, MultiControlNetModel
from .denoise import Tensors
from .inpaint import Inpainting
from .latents import check_pictures
from .memory import device_of
from .stable_diffusion import StableDiffusion

Numbers = float | Sequence[float]
ControlImage = PipelineImageInput | list[PipelineImageInput]

SHARED = ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")  # by net and UNet


class Control(NamedTuple):
    """What a call says of its nets: in each list there is one entry for each."""

    pictures: list[Tensor]  # (n, C, H, W) in [0, 1], all of one size
    scales: list[float]
    starts: list[float]  # where in the run each begins and ends, as shares of the steps
    ends: list[float]
    guess_mode: bool

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.pictures[0].shape[2:])

    def at(self, i: int, steps: int) -> list[float]:
        """The scales at step `i`: 0 for a net that doesn't serve there."""
        spans = zip(self.scales, self.starts, self.ends, strict=True)
        return [scale if start <= i / steps and (i + 1) / steps <= end else 0.0 for scale, start, end in spans]


class Controlled(StableDiffusion):
    """Base of the pipelines. `control_name`: what a callback calls the control picture."""

    scheduler_mends = ()
    mends_sample_size = False
    control_name = "control_image"
    pooling_guesses = True  # a net with `global_pool_conditions` is always in guess mode
    _control: Control

    def _prepare(self) -> None:
        super()._prepare()
        options = {"vae_scale_factor": self.vae_scale_factor, "do_convert_rgb": True}
        self.image_processor = VaeImageProcessor(**options)
        self.control_image_processor = VaeImageProcessor(**options, do_normalize=False)

    def _teams(self) -> list[list[nn.Module]]:
        own = [self.unet, self.controlnet]
        return [own, *([model] for model in self._models() if model not in own)]

    @property
    def several(self) -> bool:
        """Whether pictures and scales are lists."""
        return hasattr(self.controlnet, "nets")

    @property
    def nets(self) -> list[ControlNetModel]:
        return [*self.controlnet.nets] if self.several else [self.controlnet]

    def check_nets(self) -> None:
        """Raises ValueError for a net that was made for another UNet."""
        unet, latent = self.unet.config, self.vae.config.latent_channels
        for c in (net.config for net in self.nets):
            for key in SHARED:
                if c.per_level(key) != unet.per_level(key):
                    raise ValueError(f"controlnet is for another UNet: it has {key}={c[key]!r}, unet has {unet[key]!r}")
            if c.in_channels != latent:
                raise ValueError(f"controlnet has {c.in_channels} input channels; it must read latents alone: {latent}")

    def controlled(
        self,
        image: ControlImage | None,
        height: int | None,
        width: int | None,
        controlnet_conditioning_scale: Numbers,
        guess_mode: bool,
        control_guidance_start: Numbers,
        control_guidance_end: Numbers,
        crop: tuple[int, int, int, int] | None = None,
        **facts: Any,
    ) -> Self:
        """A view of this pipeline that knows a call's control."""
        count, pools = len(self.nets), self.nets[0].config.global_pool_conditions
        scales = _each("controlnet_conditioning_scale", controlnet_conditioning_scale, count)
        starts = _each("control_guidance_start", control_guidance_start, count, most=1)
        ends = _each("control_guidance_end", control_guidance_end, count, most=1)
        for start, end in zip(starts, ends, strict=True):
            if start >= end:
                raise ValueError(f"control_guidance_start={start} must be less than control_guidance_end={end}")
        pictures = self.control_pictures(image, height, width, crop)
        guess_mode = bool(guess_mode or (self.pooling_guesses and pools))
        return self.knowing(_control=Control(pictures, scales, starts, ends, guess_mode), **facts)

    def control_pictures(
        self,
        image: ControlImage | None,
        height: int | None,
        width: int | None,
        crop: tuple[int, int, int, int] | None,
    ) -> list[Tensor]:
        """For each net its pictures, (n, C, H, W) in [0, 1]."""
        name, nets, given = self.control_name, self.nets, [image]
        if image is None:
            raise ValueError(f"{name} is None: give the picture that the ControlNet is to follow")
        for side, value in (("height", height), ("width", width)):
            if value is not None and as_integer(value, side) < self.vae_scale_factor:
                raise ValueError(f"{side}={value} must be {self.vae_scale_factor} or more")
        if self.several:
            given = image if isinstance(image, list | tuple) else []
            by_prompt = any(isinstance(one, list | tuple) for one in given)
            counts = {len(one) if isinstance(one, list | tuple) else 1 for one in given} if by_prompt else {len(given)}
            if counts != {len(nets)}:
                raise ValueError(f"{name} must be a list of {len(nets)} pictures, one for each net, or a list of such")
            given = [list(own) for own in zip(*given, strict=True)] if by_prompt else given
        options = {"resize_mode": "default" if crop is None else "fill", "crops_coords": crop}
        made = [self.control_image_processor.preprocess(one, height, width, **options).float() for one in given]
        for picture, net in zip(made, nets, strict=True):
            shape = (net.config.conditioning_channels, *made[0].shape[2:])
            if picture.shape[1:] != shape:
                raise ValueError(f"{name} has shape {tuple(picture.shape)} as a tensor; it must have (n, *{shape})")
        return made

    def read_pictures(self, image: PipelineImageInput) -> Tensor:
        size = self._control.size
        pictures = check_pictures("image", image, self.image_processor.preprocess(image, *size), self.vae)
        factor = self.vae.factor if pictures.shape[1] == self.vae.config.latent_channels else 1
        if (own := tuple(factor * side for side in pictures.shape[2:])) != size:
            raise ValueError(f"image are latents of a picture of {own}, but {self.control_name} is of {size}")
        return pictures

    def text_tensors(self, *arguments: Any) -> tuple[Tensors, int]:
        tensors, B = super().text_tensors(*arguments)
        control, steps = (
            self._control,
            len(self.scheduler.timesteps) - (getattr(self.scheduler, "begin_index", None) or 0),
        )
        self._scales = iter([control.at(i, steps) for i in range(steps)])
        dtype, twice = next(self.controlnet.parameters()).dtype, self.do_classifier_free_guidance
        pictures = []
        for picture in control.pictures:
            if B % len(picture):
                problem = f"{self.control_name} holds {len(picture)} for {B} pictures"
                raise ValueError(f"{problem}: give one, one for each prompt, or one for each of these")
            own = picture.repeat_interleave(B // len(picture), dim=0).to(device_of(self.controlnet), dtype)
            pictures.append(torch.cat([own, own]) if twice and not control.guess_mode else own)
        tensors[self.control_name] = pictures if self.several else pictures[0]
        return tensors, B

    def told(self, tensors: Tensors, x: Tensor, t: Tensor) -> dict[str, Any]:
        """What the UNet is told, with what the nets make. In guess mode they see the half with the prompt alone."""
        told, scales = super().told(tensors, x, t), next(self._scales)
        if not any(scales):
            return told
        guess, device = self._control.guess_mode, device_of(self.controlnet)
        halved = guess and self.do_classifier_free_guidance
        rows, dtype = len(x) // 2 if halved else len(x), next(self.controlnet.parameters()).dtype
        seen, states = x[-rows:, : tensors["latents"].shape[1]], told["encoder_hidden_states"][-rows:]
        pictures, added = tensors[self.control_name], told.get("added_cond_kwargs")
        down, mid = self.controlnet(
            seen.to(device, dtype),
            t,
            states.to(device, dtype),
            [one[-rows:] for one in pictures] if self.several else pictures[-rows:],
            scales if self.several else scales[0],
            guess_mode=guess,
            added_cond_kwargs=added and {name: value[-rows:].to(device) for name, value in added.items()},
            return_dict=False,
        )
        made = [one.to(x.device, x.dtype) for one in (*down, mid)]
        if halved:
            made = [torch.cat([torch.zeros_like(one), one]) for one in made]
        return told | {"down_block_additional_residuals": made[:-1], "mid_block_additional_residual": made[-1]}


class ControlledInpainting(Controlled, Inpainting):
    """Base of those that draw a part of a picture."""

    def controlled_part(
        self,
        control_image: ControlImage | None,
        height: int | None,
        width: int | None,
        options: tuple[Numbers, bool, Numbers, Numbers],
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        padding_mask_crop: int | None,
        output_type: str,
    ) -> Self:
        """`controlled`, where the control picture is cropped as the picture is."""
        if padding_mask_crop is not None and isinstance(image, Image.Image):
            height, width = self.image_processor.get_default_height_width(image, height, width)
        crop = self._crop(image, mask_image, height, width, padding_mask_crop, output_type)
        return self.controlled(control_image, height, width, *options, crop)


def _each(name: str, value: Numbers, count: int, most: float | None = None) -> list[float]:
    """One number for each net, of one for all or a list."""
    values = [*value] if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} numbers for {count} ControlNets: give one, or one for each")
    for one in values:
        check_number(one, name, **({} if most is None else {"least": 0, "most": most}))
    return values


def taking(plain: type[StableDiffusion]) -> Callable[[Callable], Callable]:
    """For a `__call__` that hands `**others` on to the one of `plain`: its signature shows what they are."""

    def show(call: Callable) -> Callable:
        own = {p.name: p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD}
        others = inspect.signature(plain.__call__).parameters.values()
        others = [p.replace(kind=p.KEYWORD_ONLY) for p in others if p.name not in own]
        call.__signature__ = inspect.Signature([*own.values(), *others])
        return call

    return show


def with_controlnet(plain: type[StableDiffusion]) -> Callable[..., None]:
    """The `__init__` of `plain` that takes a `controlnet` too, after the `unet`: a net, or a list of several."""
    parameters = [*inspect.signature(plain.__init__).parameters.values()]
    kind, place = ControlNetModel | MultiControlNetModel | list | tuple, [p.name for p in parameters].index("unet") + 1
    parameters.insert(place, inspect.Parameter("controlnet", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind))
    signature = inspect.Signature(parameters)

    def __init__(self, *args: Any, **kwargs: Any):
        parts = signature.bind(self, *args, **kwargs).arguments
        net = parts.pop("controlnet")
        plain.__init__(**parts)
        net = MultiControlNetModel(net) if isinstance(net, list | tuple) else net
        self.register_modules(**self.components, controlnet=net)
        self.check_nets()

    __init__.__signature__, __init__.__annotations__ = signature, {p.name: p.annotation for p in parameters[1:]}
    return __init__
