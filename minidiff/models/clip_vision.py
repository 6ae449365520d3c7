"""CLIP's image encoder (Learning transferable visual models from natural language supervision, 2.4).

A picture is cut into patches, each becomes a token, and one more token, the class, gathers what the picture shows
(An image is worth 16x16 words, arXiv 2010.11929). The transformer is the text encoder's, without its mask.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from weights_compat.clip import CLIP_VISION

from ..layers import Conv2d, Linear
from ..loading.config import Config, Depth, Width
from ..loading.model import Model
from ..outputs import output
from .clip import CLIPTextConfig, Layer, embedding


@dataclass(frozen=True, eq=False, kw_only=True)
class CLIPVisionConfig(Config):
    """The keys of the image encoders; those that change nothing stand at the file's foot."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    projection_dim: Width = 512  # of CLIPVisionModelWithProjection; CLIPVisionModel has no projection
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    num_channels: Width = 3
    image_size: Width = 224
    patch_size: Width = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        self.require(self.hidden_size % self.num_attention_heads == 0, "num_attention_heads", "divide hidden_size")
        self.require(self.patch_size <= self.image_size, "patch_size", "be at most image_size")

    @property
    def tokens(self) -> int:
        """Of the patches and the class."""
        return (self.image_size // self.patch_size) ** 2 + 1


@output
class VisionOutput(NamedTuple):
    """`last_hidden_state` (B, L, hidden_size), before the last norm; `pooler_output` (B, hidden_size), the class's
    state after it; `hidden_states`, if asked for: the embeddings and each layer's output."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@output
class ProjectedVisionOutput(NamedTuple):
    """`image_embeds` (B, projection_dim): the pooled state in the space that texts and pictures share."""

    image_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPVisionModel(Model):
    """Pictures (B, 3, image_size, image_size), as `CLIPImageProcessor` makes them -> states."""

    Config = CLIPVisionConfig
    table = CLIP_VISION
    library, weights, model_type = "transformers", "model", "clip_vision_model"

    def build(self, c: CLIPVisionConfig) -> None:
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = Conv2d(c.num_channels, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = embedding(c.tokens, c.hidden_size)
        self.norm_in = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm_out = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> VisionOutput:
        c = self.config
        self.check_inputs(pixel_values=pixel_values)
        shape = (c.num_channels, c.image_size, c.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != shape:
            given = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values has shape {given}; this image encoder takes (batch, {shape})")
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        token = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = self.norm_in(torch.cat([token, patches], dim=1) + self.position_embedding.weight)  # (B, L, C)
        states = [x]
        for layer in self.layers:
            x = self.through(layer, x, None)
            states.append(x)
        return VisionOutput(x, self.norm_out(x[:, 0]), tuple(states) if output_hidden_states else None)


class CLIPVisionModelWithProjection(CLIPVisionModel):
    """The image encoder and the linear map into the space that texts and pictures share."""

    def build(self, c: CLIPVisionConfig) -> None:
        super().build(c)
        self.visual_projection = Linear(c.hidden_size, c.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> ProjectedVisionOutput:
        out = super().forward(pixel_values, output_hidden_states)
        embeds = self.visual_projection(out.pooler_output)
        return ProjectedVisionOutput(embeds, out.last_hidden_state, out.hidden_states)


CLIPVisionConfig.fixed = {"attention_dropout": 0, "dropout": 0}
# What transformers wrote into every config before 2023, whatever the model
UNREAD = """
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torchscript typical_p use_bfloat16
"""
CLIPVisionConfig.inert = CLIPTextConfig.inert | dict.fromkeys(UNREAD.split(), "of models that write texts")
