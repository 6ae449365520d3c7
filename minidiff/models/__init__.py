"""The networks, and the tokenizer. Each file is read from top to bottom, blocks first."""

from ..missing import getter
from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .clip_images import CLIPImageProcessor
from .clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from .safety_checker import StableDiffusionSafetyChecker
from .tokenizer import CLIPTokenizer
from .unet import UNet2DConditionModel, UNet2DModel
from .vae import AutoencoderKL
from .vq import VQModel

__all__ = [
    "AutoencoderKL",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "StableDiffusionSafetyChecker",
    "UNet2DConditionModel",
    "UNet2DModel",
    "VQModel",
]
__getattr__ = getter(__name__, __all__)
