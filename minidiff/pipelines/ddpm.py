"""Denoising diffusion probabilistic models (Ho et al., arXiv 2006.11239), algorithm 2: sampling."""

import torch

from ..noise import Generators
from ..pipeline import ImageOutput
from .unconditional import UnconditionalPipeline


class DDPMPipeline(UnconditionalPipeline):
    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """`batch_size` pictures. `output_type`: "pil"; "np", (B, H, W, C) in [0, 1]; "pt", (B, C, H, W) in [0, 1]."""
        return self.sample(batch_size, generator, num_inference_steps, output_type, return_dict, generator=generator)
