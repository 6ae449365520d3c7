"""Pipelines out of one file with all their weights, and into one: `from_single_file`, `save_single_file`."""

import inspect
import os
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from weights_compat.single_file import original

from ..loading.arguments import DOWNLOADS, SINGLE_FILE, check_keywords, one_device
from ..loading.config import LoadError, read_json
from ..loading.model import Model
from ..loading.save import INDEX
from ..loading.single_file import SingleFile, write_single_file
from ..loading.weights import one_dtype, which_files

LEFT_OUT = "safety_checker"  # no such file has one: it is None if it isn't given


class SingleFiles:
    """What a `DiffusionPipeline` has of this."""

    components: dict[str, Any]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike,
        *,
        config: str | os.PathLike | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | Mapping[str, Any] | None = None,
        extract_ema: bool = False,
        **keywords: Any,
    ) -> Self:
        """The pipeline out of an original file: Stable Diffusion 1, 2, inpainting, the x4 upscaler, XL and its refiner.

        `pretrained_model_link_or_path`: a `.safetensors`, or a `.ckpt` with nothing but weights in it (no code is run);
        or the address of one on the Hub. `config`: a folder or a Hub id whose configs, scheduler and tokenizers go with
        it; None for the standard model's that names and shapes tell, which come with the package. `DiffusionPipeline`
        itself picks the class too. `extract_ema`: the UNet's weights averaged in training, if the file has them.
        Components given by name are taken instead of the file's; there is no safety checker but one that is given. The
        other arguments are those of `from_pretrained`.

        Raises LoadError for a file that is missing, damaged, or holds something else, and says what it looks like; and
        as `from_pretrained` does.
        """
        files, device = which_files(one_dtype(dtype, torch_dtype), None, None), one_device(device_map)
        hub = {name: keywords.pop(name) for name in DOWNLOADS if name in keywords}
        given = {name: value for name, value in keywords.items() if name not in SINGLE_FILE}
        source = SingleFile.read(pretrained_model_link_or_path, hub)
        with source.configs(config, hub, given) as folder:
            index_file = folder / INDEX
            cls = cls.class_for(index_file)
            parameters = inspect.signature(cls).parameters
            arguments = ("config", "torch_dtype", "dtype", "device_map", "extract_ema", *DOWNLOADS)
            check_keywords(keywords, SINGLE_FILE, cls.__name__, (*parameters, *arguments))
            index = read_json(index_file)
            named = {name for name, spec in index.items() if spec != [None, None] and not name.startswith("_")}
            needed = {name for name, not_none in cls.required().items() if not_none}
            if named - parameters.keys() or needed - named - given.keys():
                raise LoadError(f"{source.file}: goes with {index.get('_class_name')}, not with {cls.__name__}")
            given = {name: None for name in parameters if name == LEFT_OUT} | given
            options = (tuple(parameters), cls.settings(), extract_ema)
            found = source.components(index_file, given, files, *options)
            pipe = cls.made_of(found, given, index_file)
        return pipe.to(device) if device else pipe

    def save_single_file(self, path: str | os.PathLike) -> None:
        """Writes the weights of the networks to one `.safetensors` file, with the names that their authors gave; the
        file is whole afterwards, or as it was.

        Not in it are configs, the scheduler, tokenizers and the safety checker; and, of Stable Diffusion 2's text
        encoder, the last layer, which is in no Hub folder either. Raises ValueError for a path that isn't a
        `.safetensors`, and for a network that such files don't hold.
        """
        models = {
            name: getattr(part, "_orig_mod", part)  # torch.compile wraps it
            for name, part in self.components.items()
            if isinstance(part, nn.Module) and name != LEFT_OUT
        }
        parts = [getattr(model, "part", "") for model in models.values()]
        places = {}
        for name, model in models.items():
            layout = original(model.part, model.config, parts) if isinstance(model, Model) else None
            if layout is None:
                raise ValueError(f"{name} is a {type(model).__name__}, which original files don't hold")
            places[layout.prefixes[0]] = model, layout.table
        if not places:
            raise ValueError(f"this {type(self).__name__} has no networks")
        write_single_file(path, places)
