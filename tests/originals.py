"""Files as Stable Diffusion's authors publish them, out of folders: by a table of the tests' own, which goes the other
way than minidiff's, from the Hub's names, and computes the place of a layer where that one counts."""

import json
import re
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet(tensors: dict[str, Tensor], layers: int = 2) -> dict[str, Tensor]:
    stride, found = layers + 1, {}
    for name, tensor in tensors.items():
        way, i, kind, j, rest = re.fullmatch(r"(?:(\w+)_blocks\.(\d+)\.(\w+)\.(\d+)\.)?(.*)", name).groups()
        where = stride * int(i or 0) + int(j or 0)
        if kind in ("downsamplers", "upsamplers"):
            end = stride * (int(i) + 1)
            attends = f"up_blocks.{i}.attentions.0.norm.weight" in tensors
            rest = rest.replace("conv", f"input_blocks.{end}.0.op" if way == "down" else "conv")
            name = rest if way == "down" else f"output_blocks.{end - 1}.{2 if attends else 1}.{rest}"
        elif way:
            row = f"input_blocks.{where + 1}" if way == "down" else f"output_blocks.{where}"
            name = f"{row}.{0 if kind == 'resnets' else 1}.{rest}"
        else:
            name = renamed(name, UNET)
        if kind == "resnets" or name.startswith(("middle_block.0", "middle_block.2")):
            name = re.sub(rf"\.({'|'.join(RESNET)})\.", lambda match: f".{RESNET[match[1]]}.", name)
        found[name] = tensor
    return found


def controlnet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the usual one, whose picture goes through eight convolutions."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("controlnet_cond_embedding.conv_in", "input_hint_block.0")
        name = name.replace("controlnet_cond_embedding.conv_out", "input_hint_block.14")
        name = re.sub(
            r"controlnet_cond_embedding\.blocks\.(\d)", lambda match: f"input_hint_block.{2 + 2 * int(match[1])}", name
        )
        name = re.sub(r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", name)
        found[name.replace("controlnet_mid_block", "middle_block_out.0")] = tensor
    own = {name: tensor for name, tensor in found.items() if re.match("input_hint|zero_conv|middle_block_out", name)}
    return own | unet({name: tensor for name, tensor in found.items() if name not in own})


def vae(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks")})
    found = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            name = renamed(name, VAE_ATTENTION)
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        name = name.replace("down_blocks", "down").replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        found[re.sub(r"(up|down)samplers\.0", r"\1sample", name)] = tensor
    return found


def open_clip(tensors: dict[str, Tensor], projects: bool) -> dict[str, Tensor]:
    """With what the Hub's folder hasn't: a last layer that isn't run, and a projection, if that doesn't project."""
    found = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            three = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[renamed(match[1], OPEN_CLIP) + f".attn.in_proj_{match[2]}"] = torch.cat(three)
        elif not re.search(r"\.[kv]_proj\.", name):
            found[renamed(name, OPEN_CLIP)] = tensor.T.contiguous() if name == "text_projection.weight" else tensor
    if not projects:
        last = max(int(name.split(".")[2]) for name in found if "resblocks" in name)
        layer = [name for name in found if name.startswith(f"transformer.resblocks.{last}.")]
        found |= {name.replace(f".{last}.", f".{last + 1}."): found[name] + 1 for name in layer}
        found["text_projection"] = torch.ones(len(found["ln_final.bias"]), 3)
    return found | {"logit_scale": torch.tensor(4.6)}


def renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        if re.search(rf"(^|\.){re.escape(ours)}(\.|$)", name) or (ours.endswith(".") and ours in name):
            name = name.replace(ours, theirs)
    return name


def original(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of a pipeline's networks as its authors would publish them, with what training leaves beside them."""
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in unet(parts["unet"]).items()}
    found |= {f"first_stage_model.{name}": tensor for name, tensor in vae(parts["vae"]).items()}
    xl = "text_encoder_2" in parts
    if "text_encoder" in parts:
        two = not xl and parts["unet"]["down_blocks.1.attentions.0.proj_in.weight"].ndim == 2  # SD 2's linear layers
        inside = open_clip(parts["text_encoder"], projects=False) if two else parts["text_encoder"]
        place = "conditioner.embedders.0.transformer" if xl else f"cond_stage_model.{'model' if two else 'transformer'}"
        found |= {f"{place}.{name}": tensor for name, tensor in inside.items()}
    if xl:
        number = 1 if "text_encoder" in parts else 0
        inside = open_clip(parts["text_encoder_2"], projects=True)
        found |= {f"conditioner.embedders.{number}.model.{name}": tensor for name, tensor in inside.items()}
    constants = ("betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "logvar")
    return found | {name: torch.ones(9) for name in constants}


def networks(folder: Path) -> dict[str, dict[str, Tensor]]:
    files = (file for file in folder.glob("*/*.safetensors") if file.parent.name != "safety_checker")
    return {file.parent.name: load_file(file) for file in files}


def write(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in original(networks(folder)).items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors, "global_step": 1, "epoch": 2}, file)
    return file


def write_sparse(file: Path, tensors: dict[str, Tensor]) -> Path:
    """A safetensors file of zeros that takes no room on the disk. Only names and shapes of `tensors` are read."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)
    return file
