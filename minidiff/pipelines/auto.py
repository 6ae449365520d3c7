"""AutoPipelineFor...: the task is named, and the folder, or another pipeline, says which system's pipeline does it."""

import os
from typing import Any, ClassVar

from ..loading.arguments import DOWNLOADS
from ..loading.config import LoadError, read_json
from ..loading.hub import fetch
from ..loading.save import INDEX
from .base import PIPELINES, DiffusionPipeline

FAMILIES = (  # the pipelines that run the same networks: for text to image, image to image, inpainting
    ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
)
TASKS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")  # how their names end, with "ControlNet" before it


class AutoPipeline:
    """Base of the three. None of them is ever made: their methods return a `DiffusionPipeline`."""

    task: ClassVar[int]  # the place in a family

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike, **keywords: Any) -> DiffusionPipeline:
        """The pipeline for this task, of the folder's family; with a `controlnet` the one that it steers.

        Keywords: those of `DiffusionPipeline.from_pretrained`. Raises LoadError where the folder's system doesn't do
        the task.
        """
        hub = {name: keywords[name] for name in DOWNLOADS if name in keywords}
        index_file = fetch(pretrained_model_or_path, lambda names: [INDEX], INDEX, **hub) / INDEX
        found, keywords = cls._of_family(read_json(index_file).get("_class_name"), str(index_file), keywords)
        return found.from_pretrained(pretrained_model_or_path, **keywords)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **given: Any) -> DiffusionPipeline:
        """The pipeline for this task with the components of another one: see `DiffusionPipeline.from_pipe`. With a
        `controlnet` it is the one that it steers; with `controlnet=None`, one without."""
        found, given = cls._of_family(type(pipeline).__name__, "pipeline", given)
        return found.from_pipe(pipeline, **given)

    @classmethod
    def _of_family(cls, name: Any, where: str, given: dict[str, Any]) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
        """The class; and what is `given` to it, without a `controlnet` that is None."""
        plain, steered = str(name).replace("ControlNet", ""), "ControlNet" in str(name)
        family = next((family for family in FAMILIES if plain in family), ())
        wanted = "".join(family[cls.task : cls.task + 1])
        if given.get("controlnet", steered or None) is not None:
            wanted = wanted.removesuffix(TASKS[cls.task]) + "ControlNet" + TASKS[cls.task]
        if wanted not in PIPELINES:
            able = ", ".join(sorted(other for family in FAMILIES for other in family if other in PIPELINES))
            raise LoadError(f"{where}: {name} has no {cls.__name__}; those who have: {able}")
        return PIPELINES[wanted], {key: value for key, value in given.items() if (key, value) != ("controlnet", None)}


class AutoPipelineForText2Image(AutoPipeline):
    """Text to image."""

    task = 0


class AutoPipelineForImage2Image(AutoPipeline):
    """Image to image."""

    task = 1


class AutoPipelineForInpainting(AutoPipeline):
    """Inpainting."""

    task = 2
