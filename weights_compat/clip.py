"""CLIP's text encoders: the Hub's names, and ours."""

from .rules import Table, nested, same

LAYER = [
    ("layer_norm1", "norm1"),
    ("self_attn.q_proj", "attention.q"),
    ("self_attn.k_proj", "attention.k"),
    ("self_attn.v_proj", "attention.v"),
    ("self_attn.out_proj", "attention.out"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
]

TEXT = [
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding", "position_embedding"),
    *nested("encoder.layers.{}", "layers.{}", LAYER),
    *same("final_layer_norm"),
]

CLIP_TEXT = Table(
    [*((f"text_model.{hub}", ours) for hub, ours in TEXT), *same("text_projection")],
    aliases=[(hub, f"text_model.{hub}") for hub, _ in TEXT],  # as transformers 5 saves CLIPTextModel
    ignored=("text_model.embeddings.position_ids", "embeddings.position_ids"),  # 0, 1, 2, ...
)
