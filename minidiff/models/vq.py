"""VQModel: pictures to latents out of a codebook (Taming transformers, arXiv 2012.09841), for the first latent
diffusion models.

The encoder and the decoder are AutoencoderKL's. In between every latent vector becomes the nearest of the codebook.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weights_compat.vae import VQ_MODEL

from ..layers import Conv2d
from ..loading.config import Width
from ..outputs import output
from .vae import Autoencoder, AutoencoderBase, Decoder, Encoder


@output
class VQEncoderOutput(NamedTuple):
    """`latents` (B, vq_embed_dim, h, w), as the encoder makes them: not yet out of the codebook."""

    latents: Tensor


@output
class VQDecoderOutput(NamedTuple):
    """`sample` (B, out_channels, H, W); `commit_loss`, a number: how far the latents are from the codebook."""

    sample: Tensor
    commit_loss: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class VQConfig(AutoencoderBase):
    """The keys of VQModel; those that real checkpoints hold at one value stand at the file's foot."""

    latent_channels: Width = 3
    num_vq_embeddings: Width = 256
    vq_embed_dim: Width | None = None  # None: latent_channels
    force_upcast: bool = False


class VQModel(Autoencoder):
    """`encode` gives latents, `decode` a picture of the codebook's nearest. Pictures are in [-1, 1] here."""

    Config = VQConfig
    table = VQ_MODEL

    def build(self, c: VQConfig) -> None:
        n = c.vq_embed_dim or c.latent_channels
        self.encoder = Encoder(c, c.latent_channels)
        self.quant_conv = Conv2d(c.latent_channels, n, 1)
        self.codebook = nn.Embedding(c.num_vq_embeddings, n)
        self.post_quant_conv = Conv2d(n, c.latent_channels, 1)
        self.decoder = Decoder(c)

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Picture (B, in_channels, H, W) -> `.latents` (B, vq_embed_dim, H / factor, W / factor)."""
        self._check(x, "x", self.config.in_channels)
        if min(x.shape[2:]) < self.factor:
            raise ValueError(f"x has shape {tuple(x.shape)}; height and width must be at least {self.factor}")
        latents = self.quant_conv(self.encoder(x, self.through))
        return VQEncoderOutput(latents) if return_dict else (latents,)

    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> VQDecoderOutput | tuple[Tensor, Tensor]:
        """Latents (B, vq_embed_dim, h, w) -> `.sample`. `force_not_quantize` decodes them as they are."""
        self._check(h, "h", self.codebook.embedding_dim)
        if force_not_quantize:
            quantized, loss = h, h.new_zeros(len(h))
        else:
            quantized, loss = self.quantize(h)
        picture = self.decoder(self.post_quant_conv(quantized), self.through)
        return VQDecoderOutput(picture, loss) if return_dict else (picture, loss)

    def quantize(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The codebook's nearest vectors, in place of `h`, and the loss that draws both to one another (eq. 4; the
        encoder's share is whole, the codebook's a quarter, as in the models' training)."""
        vectors = h.permute(0, 2, 3, 1).flatten(0, 2)  # (B, n, h, w) -> (B * h * w, n)
        nearest = torch.cdist(vectors, self.codebook.weight).argmin(dim=1)
        found = self.codebook(nearest).view(*h.shape[:1], *h.shape[2:], -1).permute(0, 3, 1, 2)
        loss = ((found.detach() - h) ** 2).mean() + 0.25 * ((found - h.detach()) ** 2).mean()
        return h + (found - h).detach(), loss  # gradients pass as though nothing had been replaced

    def forward(self, sample: Tensor) -> VQDecoderOutput:
        """Through the encoder and back."""
        return self.decode(self.encode(sample).latents)


# Keys that real checkpoints hold at one value alone
VQConfig.fixed = {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False}
