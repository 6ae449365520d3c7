"""CLIP's encoders of texts and pictures, and the safety checker around the latter: the Hub's names, and ours."""

from .rules import Table, bare, nested, same

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

CONCEPTS = ("concept_embeds", "special_care_embeds")

VISION = [
    bare("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding", "patch_embedding"),
    ("embeddings.position_embedding", "position_embedding"),
    ("pre_layrnorm", "norm_in"),  # sic
    *nested("encoder.layers.{}", "layers.{}", LAYER),
    ("post_layernorm", "norm_out"),
]

CLIP_VISION = Table(
    [*((f"vision_model.{hub}", ours, *rest) for hub, ours, *rest in VISION), *same("visual_projection")],
    aliases=[(hub, f"vision_model.{hub}", *rest) for hub, _, *rest in VISION],  # as transformers 5 saves it
    ignored=("vision_model.embeddings.position_ids", "embeddings.position_ids"),
)

SAFETY_CHECKER = Table(
    [
        *nested("vision_model.vision_model", "vision", VISION),
        *same("visual_projection"),
        *(bare(f"{name}{end}", f"{name}{end}") for name in CONCEPTS for end in ("", "_weights")),
    ],
    aliases=[(f"vision_model.{hub}", f"vision_model.vision_model.{hub}", *rest) for hub, _, *rest in VISION],
    ignored=("vision_model.vision_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)
