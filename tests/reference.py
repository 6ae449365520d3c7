"""The reference beside minidiff: its modules with random weights, and our modules with the same ones."""

import diffusers
import torch
import transformers

import minidiff
from weights_compat import TABLES
from weights_compat.manifests import narrow, read_manifest

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# On the Hub as google/ddpm-cifar10-32, at an eighth of its width: what the DDPM paper's own models differ in
CIFAR = {
    "sample_size": 32,
    "block_out_channels": [16, 32, 32, 32],
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "add_attention": True,
    "mid_block_scale_factor": 1,
}


def narrow_config(repository: str, component: str) -> tuple[str, dict]:
    """The class and narrowed config of a component of a real repository."""
    manifest = narrow(read_manifest(repository))
    return manifest.index[component][1], manifest.config(component)


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, norms' weights and biases too: a default of ones would hide a swapped tensor."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if p.ndim == 1 or "embedding" in name else p[0].numel() ** -0.5
        p.data = noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def twins(class_name: str, config: dict, seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The reference's module with random weights, and ours with the same ones."""
    if class_name.startswith("CLIP"):
        reference = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
    else:
        reference = getattr(diffusers, class_name).from_config(config)
    randomize(reference, seed)
    ours = getattr(minidiff, class_name).from_config(config)
    table = TABLES[class_name]
    ours.load_state_dict({table.ours(name): tensor.clone() for name, tensor in reference.state_dict().items()})
    return reference, ours.eval()


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the reference's largest value; infinite where anything isn't finite."""
    assert ours.shape == reference.shape
    if not (ours.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return ((ours - reference).abs().max() / reference.abs().max()).item()
