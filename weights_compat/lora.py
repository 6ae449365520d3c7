"""LoRA: how files spell the names of its tensors. A layer's spelling is the Hub's name, with `_` between its parts."""

import re

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

# Of layers in the original repository, which kohya's scripts keep for XL
ORIGINAL = {
    **{"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"},
    **{"conv_shortcut": "skip_connection", "conv_in": "input_blocks_0_0", "conv_out": "out_2"},
    **{f"time_embedding_linear_{i + 1}": f"time_embed_{2 * i}" for i in range(2)},
    **{f"add_embedding_linear_{i + 1}": f"label_emb_0_{2 * i}" for i in range(2)},
}
PLACE = re.compile(r"(down|mid|up)_block(?:s_([0-9]+))?_(resnets|attentions|downsamplers|upsamplers)_([0-9]+)_(.+)")


def split(key: str) -> tuple[str, str, str] | None:
    """What a file's name means: the component, the layer's spelling, and which tensor of it ("A", "B", "alpha")."""
    start = next((start for start in STARTS if key.startswith(start)), None)
    end = next((end for end in ENDS if key.endswith(end)), None)
    if start is None or end is None:
        return None
    return STARTS[start], key[len(start) : -len(end)].replace(".processor.", ".").replace(".", "_"), ENDS[end]


def spellings(hub: str, layers: int | None = None) -> set[str]:
    """Those of the layer that the Hub calls `hub`. `layers`: how many a level of the UNet has on the way down."""
    name = hub.replace(".", "_")
    names = {name} | {name.removesuffix(new) + old for new, old in OLD.items() if name.endswith(new)}
    names |= {name.removeprefix("text_model_") for name in names}  # transformers 5
    return names if layers is None else names | original(name, layers)


def original(name: str, layers: int) -> set[str]:
    """The spellings in the original repository, where a block is one layer with its attention, or what resamples."""
    if (place := PLACE.fullmatch(name)) is None:
        return {ORIGINAL.get(name, name)}
    way, level, kind, i, rest = place.groups()
    rest = "op" if kind == "downsamplers" else ORIGINAL.get(rest, rest)
    if way == "mid":
        return {f"middle_block_{2 * int(i) if kind == 'resnets' else 1}_{rest}"}
    block = int(level) * (layers + 1) + (layers if kind.endswith("samplers") else int(i))
    start = f"input_blocks_{block + 1}" if way == "down" else f"output_blocks_{block}"
    inside = {"attentions": (1,), "upsamplers": (1, 2)}.get(kind, (0,))  # after the attention, where there is one
    return {f"{start}_{j}_{rest}" for j in inside}
