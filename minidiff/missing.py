"""What minidiff doesn't have, said with what to do instead: for `__getattr__` of the package and of its doors."""

import importlib
import opcode
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any

OTHERS = "it is another line of systems than Stable Diffusion 1, 2 and XL"

# Names of diffusers by kind: words in them, and why they aren't here. The first that fits speaks
REASONS = {
    "Flax Onnx OpenVINO": "minidiff is PyTorch alone",
    "Quant BitsAndBytes GGUF TorchAo": "weights are float32, float16 or bfloat16 here, not quantized",
    "ControlNet T2IAdapter MultiAdapter": "of networks that steer a UNet minidiff has ControlNetModel",
    "IPAdapter ImageProjection FaceId": "it belongs to pictures as prompts",
    "Lora Peft TextualInversion LoaderMixin": "pipelines of Stable Diffusion load adapters, minidiff.lora trains them",
    "AttnProcessor AttnAdded Attention": "attention is minidiff.models.unet.Attention here, without processors",
    "Video Animate Motion 3D Temporal I2VGen Wan CogV Mochi LTX Hunyuan": "minidiff draws pictures, no video",
    "Audio Music 1D Spectrogram": "minidiff draws pictures, no sound",
    "Flux Diffusion3 SD3 DiT Transformer PixArt Sana Qwen Lumina AuraFlow Chroma HiDream Cosmos Kolors ZImage": OTHERS,
    "Kandinsky UnCLIP Wuerstchen Cascade Shap IFPipeline IFImg IFIn Amused VQ LDM Latte Paint Marigold BLIP": OTHERS,
    "Autoencoder": "of autoencoders minidiff has AutoencoderKL, AutoencoderTiny and VQModel",
}
# Methods and attributes of its pipelines and models: what to do instead
MISSING = {
    "enable_freeu": "minidiff has no FreeU; the UNet's up blocks, where it scales the skips, are in models/unet.py",
    "fuse_qkv_projections": "nothing needs it: leave it out",
    "load_ip_adapter": "minidiff has no IP-Adapter",
    "enable_lora_hotswap": "delete_adapters, then load_lora_weights",
    "set_lora_device": "adapters are where their layers are: pipe.to moves both",
    "upcast_vae": "give the VAE a dtype of its own: pipe.vae.to(torch.float32)",
}
KINDS = ("Pipeline", "Scheduler", "Model", "Output", "Tokenizer")


def getter(module: str, names: Collection[str], submodules: Collection[str] = ()) -> Callable[[str], Any]:
    """A `__getattr__` for `module`, which has `names`, and `submodules` that are imported when they are first used.

    For any other name it raises an AttributeError, or, in an `import`, an ImportError: Python shows the message of no
    other.
    """

    def __getattr__(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{module}.{name}")
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise (ImportError if _importing(sys._getframe(1)) else AttributeError)(message(module, name, names))

    return __getattr__


def _importing(frame: Any) -> bool:
    """Whether the frame that asks for a name is an `import`."""
    at = frame.f_code.co_code[frame.f_lasti]
    return at == opcode.opmap["IMPORT_FROM"] or frame.f_globals.get("__name__") == "importlib._bootstrap"


def message(module: str, name: str, names: Collection[str]) -> str:
    reason = next((reason for words, reason in REASONS.items() if any(word in name for word in words.split())), None)
    if reason is None and (near := get_close_matches(name, names, n=1, cutoff=0.92)):
        return f"{module} has no {name}: did you mean {near[0]}?"
    kind = next((kind for kind in KINDS if name.endswith(kind)), None)
    alike = sorted(known for known in names if kind and known.endswith(kind)) or get_close_matches(name, names)
    there = f" It has {', '.join(alike)}." if alike else ""
    return f"{module} has no {name}{f': {reason}' if reason else ''}.{there} For anything else use diffusers"


class Explains(type):
    """The class of classes whose missing attributes are told with what to do instead: `StableDiffusionPipeline.foo`."""

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(no_attribute(cls.__name__, name, dir(cls)))


def no_attribute(owner: str, name: str, names: Collection[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.75)
    hint = MISSING.get(name) or (f"did you mean {near[0]}?" if near else "see dir() for what it has")
    return f"{owner} has no {name!r}: {hint}"
