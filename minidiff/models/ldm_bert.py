"""LDMBertModel: the text encoder of the first text-to-image latent diffusion (arXiv 2112.10752, section 4.3.1).

A transformer whose tokens see one another in both directions, trained together with the UNet. Its texts are cut by
BERT's tokenizer.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.ldm_bert import LDM_BERT

from ..checks import check_tensors
from ..layers import Linear, attention
from ..loading.config import Config, Depth, Width
from ..loading.model import Model
from .clip import embedding


@dataclass(frozen=True, eq=False, kw_only=True)
class LDMBertConfig(Config):
    """The keys of LDMBertModel; those that change nothing stand at the file's foot."""

    vocab_size: Width = 30522
    max_position_embeddings: Width = 77
    encoder_layers: Depth = 32
    encoder_ffn_dim: Width = 5120
    encoder_attention_heads: Width = 8
    head_dim: Width = 64  # heads * head_dim need not be d_model
    d_model: Width = 1280
    activation_function: Literal["gelu"] = "gelu"


class LDMBertLayer(nn.Module):
    def __init__(self, c: LDMBertConfig):
        super().__init__()
        inner = c.encoder_attention_heads * c.head_dim
        self.heads = c.encoder_attention_heads
        self.norm1 = nn.LayerNorm(c.d_model)
        self.q, self.k, self.v = (Linear(c.d_model, inner, bias=False) for _ in range(3))
        self.out = Linear(inner, c.d_model)
        self.norm2 = nn.LayerNorm(c.d_model)
        self.fc1 = Linear(c.d_model, c.encoder_ffn_dim)
        self.fc2 = Linear(c.encoder_ffn_dim, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.out(attention(self.q(h), self.k(h), self.v(h), self.heads))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class LDMBertModel(Model):
    Config = LDMBertConfig
    library, table, weights = "latent_diffusion", LDM_BERT, "model"

    def build(self, c: LDMBertConfig) -> None:
        self.token_embedding = embedding(c.vocab_size, c.d_model)
        self.position_embedding = embedding(c.max_position_embeddings, c.d_model)
        self.layers = nn.ModuleList(LDMBertLayer(c) for _ in range(c.encoder_layers))
        self.norm_out = nn.LayerNorm(c.d_model)
        self.to_logits = Linear(c.d_model, c.vocab_size)  # of its training; no pipeline reads it

    def file_config(self) -> dict[str, Any]:
        return {**self.config, "architectures": [type(self).__name__], "model_type": "ldmbert"}

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """`input_ids` (B, L), L up to max_position_embeddings -> one tensor in a tuple: the states (B, L, d_model)."""
        c = self.config
        check_tensors(input_ids=input_ids)
        if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.shape[1] > c.max_position_embeddings:
            shape = f"(batch, length up to {c.max_position_embeddings})"
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; this text encoder takes {shape}")
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(places)  # (B, L, d_model)
        for layer in self.layers:
            x = self.through(layer, x)
        return (self.norm_out(x),)


# Keys that change nothing here
LDMBertConfig.inert = {
    **dict.fromkeys(("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"), "the file"),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"), "for training"),
    **dict.fromkeys(("encoder_layerdrop", "init_std", "use_cache", "scale_embedding"), "never read"),
    **dict.fromkeys(("num_hidden_layers", "pad_token_id"), "said elsewhere: encoder_layers, and the tokenizer"),
}
