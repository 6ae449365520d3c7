"""Stable Diffusion in one evening's reading. The public names; each file says what it is about in its first lines."""

from pathlib import Path

from . import models, pipelines, schedulers

# What is public is said once, in the `__all__` of each package: hence the stars
from .loading.config import ConfigError, LoadError
from .missing import getter
from .models import *  # noqa: F403
from .pipelines import *  # noqa: F403
from .schedulers import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "LoadError",
    "bundled",
    *models.__all__,
    *pipelines.__all__,
    *schedulers.__all__,
]

DOORS = ("image_processor", "optimization", "training_utils", "utils")  # where documentation finds its helpers
__getattr__ = getter(__name__, __all__, DOORS)


def bundled(name: str) -> Path:
    """The folder of a model that comes with the package: "tiny-emoji" or "tiny-ddpm". Raises ValueError for others."""
    folders = Path(__file__).parent / "bundled"
    names = sorted(folder.parent.name for folder in folders.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"name={name!r} is not bundled; there are: {', '.join(names)}")
    return folders / name
