"""LDMBertModel: the Hub's names, and ours."""

from .rules import Table, nested, same

LAYER = [
    ("self_attn_layer_norm", "norm1"),
    ("self_attn.q_proj", "q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.out_proj", "out"),
    ("final_layer_norm", "norm2"),
    *same("fc1", "fc2"),
]

LDM_BERT = Table(
    [
        ("model.embed_tokens", "token_embedding"),
        ("model.embed_positions", "position_embedding"),
        *nested("model.layers.{}", "layers.{}", LAYER),
        ("model.layer_norm", "norm_out"),
        *same("to_logits"),
    ]
)
