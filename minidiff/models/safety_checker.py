"""StableDiffusionSafetyChecker: which pictures are not safe for work, by their likeness to concepts that CLIP knows.

The concepts are vectors in the space that texts and pictures share (Red-teaming the Stable Diffusion safety filter,
arXiv 2210.04610, found out which): 17 that are not wanted, and 3 for which the others count a little more.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.clip import SAFETY_CHECKER

from ..layers import Linear
from ..loading.config import Config, Width
from ..loading.model import Model
from .clip import CLIPTextConfig
from .clip_vision import CLIPVisionConfig, CLIPVisionModel

CARE = 0.01  # what is added to the scores of a picture that is like a concept of special care


@dataclass(frozen=True, eq=False, kw_only=True)
class SafetyCheckerConfig(Config):
    """`vision_config` holds the keys of CLIPVisionModel; `vision_config_dict`, in old files, goes before them."""

    projection_dim: Width = 512
    vision_config: dict = field(default_factory=dict)
    vision_config_dict: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        vision = CLIPVisionConfig.read(self.vision_config | (self.vision_config_dict or {}), "vision_config")
        object.__setattr__(self, "vision", vision)


class Scores(NamedTuple):
    """By how much a picture is beyond the threshold of each concept: (B, 3) and (B, 17), rounded to thousandths."""

    special: Tensor
    concepts: Tensor


class StableDiffusionSafetyChecker(Model):
    Config = SafetyCheckerConfig
    library, table, weights, model_type = "stable_diffusion", SAFETY_CHECKER, "model", "clip"

    def build(self, c: SafetyCheckerConfig) -> None:
        self.vision = CLIPVisionModel(c.vision)
        self.visual_projection = Linear(c.vision.hidden_size, c.projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(17, c.projection_dim))
        self.concept_embeds_weights = nn.Parameter(torch.ones(17))  # thresholds
        self.special_care_embeds = nn.Parameter(torch.ones(3, c.projection_dim))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(3))

    def file_config(self) -> dict[str, Any]:
        kept = {"projection_dim": self.config.projection_dim, "vision_config": self.vision.file_config()}
        return kept | self.header()

    def scores(self, clip_input: Tensor) -> Scores:
        """Of pictures (B, 3, H, W), as CLIPImageProcessor makes them."""
        embeds = self.visual_projection(self.vision(clip_input).pooler_output)  # (B, projection_dim)

        def beyond(concepts: Tensor, thresholds: Tensor) -> Tensor:
            cosines = F.normalize(embeds) @ F.normalize(concepts).T
            return cosines.float() - thresholds.float()

        special = beyond(self.special_care_embeds, self.special_care_embeds_weights).round(decimals=3)
        care = CARE * (special > 0).any(dim=1, keepdim=True)
        concepts = beyond(self.concept_embeds, self.concept_embeds_weights) + care
        return Scores(special, concepts.round(decimals=3))

    @torch.no_grad()
    def forward(
        self, clip_input: Tensor, images: Tensor | np.ndarray | list[Any]
    ) -> tuple[Tensor | np.ndarray | list[Any], list[bool]]:
        """Looks at `clip_input` (B, 3, 224, 224). Returns `images`, a batch of tensors or arrays of any size, with
        zeros for those that aren't safe, and a flag for each."""
        flags = (self.scores(clip_input).concepts > 0).any(dim=1).tolist()
        if len(flags) != len(images):
            raise ValueError(f"images are {len(images)}, but clip_input holds {len(flags)}: they must be the same")
        if any(flags):
            warnings.warn(
                f"{sum(flags)} of {len(flags)} pictures may not be safe for work, and are black instead: try another"
                " prompt or another seed",
                stacklevel=2,
            )
        kept = [image * 0 if flag else image for image, flag in zip(images, flags, strict=True)]
        join = {Tensor: torch.stack, np.ndarray: np.stack}.get(type(images), list)
        return join(kept), flags


SafetyCheckerConfig.inert = CLIPTextConfig.inert | dict.fromkeys(
    ("text_config", "text_config_dict", "logit_scale_init_value"), "CLIP's text encoder isn't part of the checker"
)
