"""The keywords of every `from_pretrained` and `save_pretrained` that the reference has and that do little here.

Each is taken where it means nothing, and refused with the reason where it would mean something. A keyword that nobody
knows is an error that lists those there are.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

ANYTHING = object()
DOWNLOADS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "use_auth_token")

# keyword: the values that change nothing, and what to do instead of giving another
LOADING: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("low_cpu_mem_usage", "offload_state_dict", "use_fast"), (ANYTHING, "")),  # memory is low always
    **dict.fromkeys(("resume_download", "local_dir_use_symlinks"), (ANYTHING, "")),  # huggingface_hub's own matter now
    **dict.fromkeys(("user_agent", "weights_only", "trust_remote_code"), (ANYTHING, "")),  # no code of a folder is run
    "proxies": ((None,), "set the environment variable HTTPS_PROXY"),
    "mirror": ((None,), "set the environment variable HF_ENDPOINT"),
    "local_dir": ((None,), "download with huggingface_hub.snapshot_download, then load that folder"),
    "custom_pipeline": ((None,), "no code of a repository is run: import the pipeline's class and build it yourself"),
    "custom_revision": ((None,), "no code of a repository is run"),
    "load_connected_pipeline": ((None, False), "load the other pipeline by its own name"),
    **dict.fromkeys(
        ("max_memory", "offload_folder", "offload_buffers"),
        ((None, False), "a model isn't split over devices; see enable_sequential_cpu_offload"),
    ),
    "quantization_config": ((None,), "quantized weights aren't supported"),
    "gguf_file": ((None,), "quantized weights aren't supported"),
    "disable_mmap": ((None, False), "weights are mapped always; copy the folder to a local disk if that is slow"),
    "output_loading_info": (
        (None, False),
        "a missing or unexpected tensor is an error here",
    ),
    "ignore_mismatched_sizes": ((None, False), "give the config that the weights have"),
    "return_unused_kwargs": ((None, False), "an argument without use is an error here"),
    "key_mapping": ((None,), "the names that are known stand in weights_compat's tables"),
    "attn_implementation": ((None, "sdpa"), "attention is that of minidiff/layers.py always"),
    **dict.fromkeys(("from_flax", "from_tf", "use_flashpack"), ((None, False), "weights are safetensors, or .bin")),
    **dict.fromkeys(
        ("use_onnx", "provider", "provider_options", "sess_options"),
        ((None, False), "ONNX isn't supported; torch.onnx exports a loaded model"),
    ),
}
GIVE_CONFIG = "give config=, a folder or a Hub id with the configs"
GIVE_SCHEDULER = "give scheduler="
SINGLE_FILE = LOADING | {
    **dict.fromkeys(("original_config", "original_config_file"), ((None,), GIVE_CONFIG)),
    **dict.fromkeys(("image_size", "num_in_channels", "upcast_attention", "scaling_factor"), ((None,), GIVE_CONFIG)),
    **dict.fromkeys(("scheduler_type", "prediction_type"), ((None,), GIVE_SCHEDULER)),
    "config_revision": ((None,), "give config= a folder"),
    "load_safety_checker": ((None, False), "give safety_checker= and feature_extractor="),
    "device": ((None,), "give device_map="),
}
UPLOAD = "save, then upload the folder with huggingface_hub.upload_folder"
SAVING: dict[str, tuple[Any, str]] = {
    "push_to_hub": ((None, False), UPLOAD),
    **dict.fromkeys(("repo_id", "commit_message", "private", "create_pr", "token"), ((None, False), UPLOAD)),
    "save_function": ((None,), "safetensors.torch.save_file writes the weights always"),
    "state_dict": ((None,), "load it into the model first"),
    **dict.fromkeys(
        ("use_flashpack", "save_peft_format", "save_original_format", "distributed_checkpoint"),
        (ANYTHING, ""),
    ),
}


def check_keywords(
    given: Mapping[str, Any], table: Mapping[str, tuple[Any, str]], owner: str, takes: Collection[str]
) -> dict[str, Any]:
    """The keywords of `given` that stand in `takes`, after a look at all the others.

    Raises ValueError for a value of `table`'s keywords that isn't supported, TypeError for an unknown keyword.
    """
    for keyword in given.keys() & table.keys() - set(takes):
        harmless, instead = table[keyword]
        if harmless is not ANYTHING and not any(given[keyword] == value for value in harmless):
            raise ValueError(f"{owner}: {keyword}={given[keyword]!r} is not supported: {instead}")
    if unknown := sorted(given.keys() - table.keys() - set(takes)):
        raise TypeError(f"{owner} has no {', '.join(unknown)}; it takes {', '.join(takes)}")
    return {keyword: value for keyword, value in given.items() if keyword in takes}


def one_device(device_map: Any) -> torch.device | None:
    """Where a `device_map` puts the whole model. Raises ValueError if it splits it, or if there is no such device."""
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        if torch.cuda.device_count() > 1:
            raise ValueError(f'device_map={device_map!r} would split it over several GPUs: name one, such as "cuda:0"')
        mps = torch.backends.mps.is_available()
        device_map = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device_map is None:
        return None
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(f'device_map={device_map!r} must be one device, such as "cuda", or "balanced"') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device_map={device_map!r}: there is no such device here")
    return device
