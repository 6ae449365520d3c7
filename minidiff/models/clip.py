"""CLIP's text encoder (Learning transferable visual models from natural language supervision, 2.4).

Token ids (B, L) become states (B, L, hidden_size), which the UNet reads through cross-attention. A causal transformer:
each token sees those before it, so that the state at the end-of-text token has seen the whole prompt.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights_compat.clip import CLIP_TEXT

from ..checks import check_tensors
from ..layers import Linear
from ..loading.config import Config, Depth, Width
from ..loading.model import Model
from ..outputs import output
from .unet import Attention


@dataclass(frozen=True, eq=False, kw_only=True)
class CLIPTextConfig(Config):
    """The keys of both text encoders; those that change nothing stand at the file's foot."""

    vocab_size: Width = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512  # of CLIPTextModelWithProjection; CLIPTextModel has no projection
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Width = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"  # OpenAI's CLIP has the first, OpenCLIP the second
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        super().__post_init__()
        self.require(self.hidden_size % self.num_attention_heads == 0, "num_attention_heads", "divide hidden_size")


class Layer(nn.Module):
    def __init__(self, c: CLIPTextConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attention = Attention(c.hidden_size, c.num_attention_heads, bias=True)
        self.norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.fc1 = Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size)
        self.quick_gelu = c.hidden_act == "quick_gelu"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask)
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * (1.702 * h).sigmoid_() if self.quick_gelu else F.gelu(h))


@output
class TextOutput(NamedTuple):
    """`last_hidden_state` (B, L, hidden_size) after the last norm; `pooler_output` (B, hidden_size), its value at the
    end of the text; `hidden_states`, if asked for: the embeddings and each layer's output, before the last norm."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@output
class ProjectedTextOutput(NamedTuple):
    """`text_embeds` (B, projection_dim): the pooled state in the space that texts and pictures share."""

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


def embedding(rows: int, dim: int) -> nn.Embedding:
    """A table of vectors, first drawn as in CLIP, 2.4: torch's own default is too wide."""
    weight = torch.empty(rows, dim)
    if not weight.is_meta:  # there is nothing to fill; and torch would import its compiler for it, a second's work
        nn.init.normal_(weight, std=0.02)
    return nn.Embedding.from_pretrained(weight, freeze=False)


class CLIPTextModel(Model):
    Config = CLIPTextConfig
    library, table, weights = "transformers", CLIP_TEXT, "model"
    model_type, part = "clip_text_model", "text_encoder"

    def build(self, c: CLIPTextConfig) -> None:
        self.token_embedding = embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        """So many tokens: the last ones go, or new ones come, with vectors at random."""
        rows = self.token_embedding.weight.data
        new = embedding(max(new_num_tokens - len(rows), 0), rows.shape[1]).weight.data
        return self.set_token_rows(torch.cat([rows[:new_num_tokens], new.to(rows)]))

    def set_token_rows(self, rows: Tensor) -> nn.Embedding:
        """The vectors of all tokens, (vocab_size, hidden_size): the config follows."""
        self.config = type(self.config).read({**self.config.explicit(), "vocab_size": len(rows)})
        self.token_embedding.weight, self.token_embedding.num_embeddings = nn.Parameter(rows), len(rows)
        return self.token_embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> TextOutput:
        """`input_ids` (B, L), L up to max_position_embeddings; `attention_mask` (B, L), 0 where a token is hidden.

        Stable Diffusion gives no mask: its UNet was trained on states that see the padding.
        """
        c = self.config
        check_tensors(input_ids=input_ids)
        if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; this text encoder takes"
                f" (batch, length up to {c.max_position_embeddings})"
            )
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids must hold integers (int32 or int64), but are {input_ids.dtype}")
        if not (torch.compiler.is_compiling() or input_ids.is_meta):  # where there are no values to look at
            low, high = input_ids.min().item(), input_ids.max().item()
            if low < 0 or high >= c.vocab_size:
                raise ValueError(f"input_ids are {low}..{high}; this text encoder knows 0..{c.vocab_size - 1}")
            self._check_ends(input_ids)
        B, L = input_ids.shape
        places = torch.arange(L, device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(places)  # (B, L, hidden_size)
        mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()  # causal: row i sees columns up to i
        if attention_mask is not None:
            check_tensors(attention_mask=attention_mask)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, not that of input_ids")
            mask = mask & attention_mask[:, None, None, :].bool()  # (B, 1, L, L)
        states = [x]
        for layer in self.layers:
            x = self.through(layer, x, mask)
            states.append(x)
        x = self.final_layer_norm(x)
        # Configs from before 2023 say 2, which was never true: there the end of text is the largest id. Where new
        # tokens were added above it, the config names the right one
        is_end = input_ids if c.eos_token_id == 2 else (input_ids == c.eos_token_id).int()
        pooled = x[torch.arange(B, device=x.device), is_end.argmax(dim=-1)]
        return TextOutput(x, pooled, tuple(states) if output_hidden_states else None)

    def _check_ends(self, input_ids: Tensor) -> None:
        """Raises a ValueError where a text has no end: the start's state, which has seen nothing, would be pooled."""
        end = self.config.eos_token_id
        if end == 2:  # the end is the largest id then. The next one below is the start's
            endless = (input_ids[:, 1:] < input_ids[:, :1]).all(dim=1) & (input_ids.shape[1] > 1)
        else:
            endless = (input_ids != end).all(dim=1)
        if endless.any():
            which = "the largest id" if end == 2 else f"eos_token_id={end}"
            rows = endless.nonzero().flatten().tolist()
            raise ValueError(f"input_ids has no end-of-text token ({which}) in the texts {rows}: a tokenizer adds it")


class CLIPTextModelWithProjection(CLIPTextModel):
    """The text encoder and the linear map into the space that texts and pictures share. XL's second text encoder."""

    part = "text_encoder_2"

    def build(self, c: CLIPTextConfig) -> None:
        super().build(c)
        self.text_projection = Linear(c.hidden_size, c.projection_dim, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> ProjectedTextOutput:
        out = super().forward(input_ids, attention_mask, output_hidden_states)
        return ProjectedTextOutput(self.text_projection(out.pooler_output), out.last_hidden_state, out.hidden_states)


# Keys that real checkpoints hold at one value alone, and those that change nothing
CLIPTextConfig.fixed = {
    "attention_dropout": 0,
    "dropout": 0,
    "output_hidden_states": False,
    "return_dict": True,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
}
CLIPTextConfig.inert = {
    **dict.fromkeys(
        ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"),
        "describes the file, not the network",
    ),
    **dict.fromkeys(("id2label", "label2id", "problem_type"), "a classifier's"),
    **dict.fromkeys(("initializer_factor", "initializer_range"), "the first weights of a new model"),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), "the tokenizer holds the ids of these tokens"),
}
