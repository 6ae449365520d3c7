"""Names of tensors: what the files on the Hub call them, and what minidiff does. Data, and nothing of torch."""

from .clip import CLIP_TEXT, CLIP_VISION, SAFETY_CHECKER
from .controlnet import CONTROLNET
from .ldm_bert import LDM_BERT
from .rules import Table
from .unet import UNET_2D, UNET_2D_CONDITION
from .vae import AUTOENCODER_KL, AUTOENCODER_TINY, VQ_MODEL

TABLES: dict[str, Table] = {
    "AutoencoderKL": AUTOENCODER_KL,
    "AutoencoderTiny": AUTOENCODER_TINY,
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "StableDiffusionSafetyChecker": SAFETY_CHECKER,
    "ControlNetModel": CONTROLNET,
    "LDMBertModel": LDM_BERT,
    "UNet2DConditionModel": UNET_2D_CONDITION,
    "UNet2DModel": UNET_2D,
    "VQModel": VQ_MODEL,
}
