"""The standard models: which one a file without a folder is, told by names and shapes; and the configs it goes with,
which are those of the manifests.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .clip_vocabulary import write_clip_tokenizer

MANIFESTS = Path(__file__).parent / "manifests"

# Channels of the UNet's input, and width of the text states that it reads
UNETS = {
    (4, 768): "stable-diffusion-v1-5",
    (8, 768): "instruct-pix2pix",
    (9, 768): "stable-diffusion-inpainting",
    (4, 1024): "stable-diffusion-2-1",
    (7, 1024): "stable-diffusion-x4-upscaler",
    (9, 1024): "stable-diffusion-2-inpainting",
    (4, 1280): "stable-diffusion-xl-refiner-1.0",
    (4, 2048): "stable-diffusion-xl-base-1.0",
    (9, 2048): "stable-diffusion-xl-1.0-inpainting-0.1",
}
VAES = {4: "stable-diffusion-v1-5", 3: "stable-diffusion-x4-upscaler"}  # levels

# What names and shapes don't tell: the standard model that is taken, by which network; what settles it; what is to say
DOUBTS = {
    ("stable-diffusion-2-1", "unet"): (
        "scheduler",
        "whether this UNet of Stable Diffusion 2 predicts v or noise, the file doesn't say. v is taken; for the base"
        ' (512 pixels) give config="stabilityai/stable-diffusion-2-1-base"',
    ),
    ("stable-diffusion-v1-5", "vae"): (
        "scaling_factor",
        "a VAE of Stable Diffusion 1, 2 or XL, the file doesn't say which. 1 or 2 is taken; for XL's give"
        " scaling_factor=0.13025",
    ),
}

WAY_DOWN = (  # keys of a UNet's config that its ControlNet has too
    *("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "use_linear_projection", "transformer_layers_per_block", "addition_embed_type"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim", "only_cross_attention", "num_class_embeds"),
)

# What a name has in it, in files that hold something else: what that is. The first that fits speaks
STRANGERS = {
    r"\.lora_|^lora_|\.hada_w1|\.lokr_w1|_lora\.(up|down)": "a LoRA, which goes on top of a model",
    r"^(string_to_param|emb_params|clip_[lg])$|^<.*>$": "a textual inversion, a word for a model's prompts",
    r"^control_model\.|(^|\.)controlnet_|input_hint_block|zero_convs": "a ControlNet: ControlNetModel.from_single_file",
    r"motion_modules\.|time_stack\.|temporal_transformer|\.time_mix": "a video model",
    r"joint_blocks\.|^text_encoders\.clip_[lg]\.": "Stable Diffusion 3",
    r"double_blocks\.|single_blocks\.|single_transformer_blocks\.": "Flux",
    r"^edm_(mean|std)$": "Playground 2.5: give config=, its folder, for its latents are normed in another way",
    r"clip_txt_mapper|\.channelwise\.": "Stable Cascade",
    r"^depth_model\.": "Stable Diffusion 2's depth model, which holds MiDaS: load its folder",
    r"adaLN|patch_embed|x_embedder|scale_shift_table|(^|\.)head\.modulation": "a diffusion transformer",
    r"^(down_blocks|mid_block|(en|de)coder\.mid_block|text_model|layers)\.": "one part of a folder: from_pretrained",
}

# What training leaves in a file besides the networks
_LEFTOVERS = re.compile(
    r"(low_scale_model\.)?(betas|(log_)?(sqrt_)?(one_minus_)?(recip(m1)?_)?alphas_cumprod(_prev)?|posterior_\w+"
    r"|sqrt_\w+|log_one_\w+|lvlb_weights|logvar|scale_factor)"
    r"|denoiser\.\w+|model_ema\..*|(first_stage_model\.)?loss\..*|(loss|discriminator)\..*|cond_stage_model\.\w+"
    r"|conditioner\.embedders\.\d\.(logit_scale|text_projection)|edm_(mean|std)"
)


def standard_model(shapes: Mapping[str, Sequence[int]]) -> tuple[str | None, str]:
    """The standard model that has tensors of these names and shapes, or None; and the network that tells, which is the
    VAE ("vae") only where there is no UNet ("unet")."""
    first = [shape for name, shape in shapes.items() if re.search(r"(^|\.)(input_blocks\.0\.0|conv_in)\.weight$", name)]
    texts = [shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    if first and texts:
        fits = len(first[0]) == 4 and len(texts[0]) == 2 and "edm_mean" not in shapes  # Playground's are XL's else
        return UNETS.get((first[0][1], texts[0][1])) if fits else None, "unet"
    levels = {match[2] for match in map(re.compile(r"decoder\.up(_blocks)?\.(\d+)\.").search, shapes) if match}
    return VAES.get(len(levels)), "vae"


def is_leftover(name: str) -> bool:
    """Whether a tensor belongs to no network that draws."""
    return _LEFTOVERS.fullmatch(name) is not None


def stranger(names: Iterable[str]) -> str | None:
    """What a file with tensors of these names looks like, if that is something known and no Stable Diffusion."""
    names = list(names)
    return next((what for piece, what in STRANGERS.items() if any(map(re.compile(piece).search, names))), None)


def standard_named(name: str) -> str | None:
    """The standard model of that name, or of the repository `name`; None if there is none."""
    file = MANIFESTS / f"{name.rpartition('/')[2]}.json"
    known = file.is_file() and name in (file.stem, json.loads(file.read_text(encoding="utf-8"))["repository"])
    return file.stem if known else None


def standard_files(name: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a standard model's folder, by path; and, besides, the config of ControlNets for it."""
    files = json.loads((MANIFESTS / f"{name}.json").read_text(encoding="utf-8"))["files"]
    shared = {key: value for key, value in files["unet/config.json"].items() if key in WAY_DOWN}
    return files | {"controlnet/config.json": {"_class_name": "ControlNetModel", **shared}}


def write_files(files: Mapping[str, dict[str, Any]], folder: Path) -> None:
    """Writes the JSON files of a folder, by path, and CLIP's vocabulary for its tokenizers of that kind."""
    for name, spec in files["model_index.json"].items():
        if name.startswith("tokenizer") and spec[1] and spec[1].startswith("CLIP"):
            write_clip_tokenizer(folder / name)  # the vocabulary; `files` have this folder's own settings
    for path, values in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
