"""The networks, and the tokenizer. Each file is read from top to bottom, blocks first."""

from ..missing import getter
from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .tokenizer import CLIPTokenizer
from .unet import UNet2DConditionModel, UNet2DModel
from .vae import AutoencoderKL

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "UNet2DConditionModel",
    "UNet2DModel",
]
__getattr__ = getter(__name__, __all__)
