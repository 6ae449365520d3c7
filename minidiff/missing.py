"""What minidiff doesn't have, said with what to do instead: for `__getattr__` of the package and of its doors."""

import importlib
import opcode
import re
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any

# Names of diffusers by kind; the first pattern found in a name speaks for it
REASONS = {
    r"^(Flax|Onnx|OpenVINO|TF)": "minidiff is PyTorch alone",
    r"Quant|BitsAndBytes|GGUF|TorchAo": "weights are float32, float16 or bfloat16 here, not quantized",
    r"ControlNet|T2IAdapter|MultiAdapter": "it belongs to networks that steer a UNet",
    r"IPAdapter|ImageProjection|FaceId": "it belongs to pictures as prompts",
    r"Lora|PeftAdapter|TextualInversion|LoaderMixin": "it belongs to adapters: wrap the layers of a network by hand",
    r"Attn.*Processor|^Attention": "attention has no processors here; minidiff.models.unet.Attention is all of it",
    r"Video|Animate|Motion|3D|Temporal|I2VGen|Wan|CogVideo|Mochi|LTX|Hunyuan": "minidiff draws pictures, no video",
    r"Audio|Music|1D|Spectrogram": "minidiff draws pictures, no sound",
    r"Flux|Diffusion3|SD3|DiT|Transformer|PixArt|Sana|Qwen|Lumina|AuraFlow|Bria|Chroma|HiDream|Cosmos|Kolors|ZImage": "transformers in place of UNets are another line of systems than Stable Diffusion 1, 2 and XL",
    r"Kandinsky|UnCLIP|Wuerstchen|Cascade|Shap|DeepFloyd|^IF|Amused|VQ|LDM|Latte|Paint|Marigold|LEdits|BLIP": "it is another system than Stable Diffusion 1, 2 and XL",
    r"XL": "UNet2DConditionModel, AutoencoderKL and CLIPTextModelWithProjection run the networks of XL",
    r"Autoencoder": "of autoencoders minidiff has AutoencoderKL, that of Stable Diffusion",
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
    near = get_close_matches(name, names, n=1, cutoff=0.85)
    if near:
        return f"{module} has no {name}: did you mean {near[0]}?"
    reason = next((reason for pattern, reason in REASONS.items() if re.search(pattern, name)), None)
    kind = next((kind for kind in KINDS if name.endswith(kind)), "")
    alike = sorted(known for known in names if kind and known.endswith(kind)) or sorted(names)
    instead = f" {module} has {', '.join(alike)}." if alike else ""
    return f"{module} has no {name}{f': {reason}' if reason else ''}.{instead} For the rest there is diffusers."
