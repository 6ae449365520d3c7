"""LoRA: how files spell the names of its tensors. A layer's spelling is the Hub's name, with `_` between its parts."""

from collections.abc import Mapping
from typing import Any

from .rules import Table
from .single_file import unet

STARTS = {
    **{f"{component}.": component for component in ("unet", "text_encoder", "text_encoder_2")},
    **{"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"},
}
ENDS = {
    **{".lora_A.weight": "A", ".lora_B.weight": "B"},  # peft
    **{".lora.down.weight": "A", ".lora.up.weight": "B"},  # diffusers before peft
    **{".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B"},  # its text encoders
    **{"_lora.down.weight": "A", "_lora.up.weight": "B"},  # its attention processors: attn1.processor.to_q_lora
    **{".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha"},  # kohya's scripts
}
OTHERS = {  # adapters of other kinds, by what is in their names
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "DoRA"),
    **dict.fromkeys(("lora_mid", "hada_", "lokr_", "oft_", "ia3_"), "LyCORIS"),
}

# Of layers before peft
OLD = {"_to_out_0": "_to_out", "_q_proj": "_to_q", "_k_proj": "_to_k", "_v_proj": "_to_v", "_out_proj": "_to_out"}


def split(key: str) -> tuple[str, str, str] | None:
    """What a file's name means: the component, the layer's spelling, and which tensor of it ("A", "B", "alpha")."""
    start = next((start for start in STARTS if key.startswith(start)), None)
    end = next((end for end in ENDS if key.endswith(end)), None)
    if start is None or end is None:
        return None
    return STARTS[start], key[len(start) : -len(end)].replace(".processor.", ".").replace(".", "_"), ENDS[end]


def spellings(hub: str, original: str | None = None) -> set[str]:
    """Those of the layer that the Hub calls `hub`, and the original repository (kohya's scripts for XL) `original`."""
    name = hub.replace(".", "_")
    names = {name} | {name.removesuffix(new) + old for new, old in OLD.items() if name.endswith(new)}
    names |= {name.removeprefix("text_model_") for name in names}  # transformers 5
    return names | ({original.replace(".", "_")} if original else set())


def originals(config: Mapping[str, Any]) -> Table | None:
    """The original repository's names, if that is a UNet's config."""
    return unet(config) if "up_block_types" in config else None
