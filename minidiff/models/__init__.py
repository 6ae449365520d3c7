"""The networks, and the tokenizer. Each file is read from top to bottom, blocks first."""

from ..missing import getter
from .bert_tokenizer import BertTokenizer
from .clip import CLIPTextModel, CLIPTextModelWithProjection
from .clip_images import CLIPImageProcessor
from .clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from .controlnet import ControlNetModel, MultiControlNetModel
from .ldm_bert import LDMBertModel
from .safety_checker import StableDiffusionSafetyChecker
from .tiny_vae import AutoencoderTiny
from .tokenizer import CLIPTokenizer
from .unet import UNet2DConditionModel
from .unet_2d import UNet2DModel
from .vae import AutoencoderKL
from .vq import VQModel

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "BertTokenizer",
    "CLIPImageProcessor",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "ControlNetModel",
    "LDMBertModel",
    "MultiControlNetModel",
    "StableDiffusionSafetyChecker",
    "UNet2DConditionModel",
    "UNet2DModel",
    "VQModel",
]
__getattr__ = getter(__name__, __all__)
