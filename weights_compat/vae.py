"""AutoencoderKL and VQModel: the Hub's names, and ours."""

from .rules import Table, nested, same
from .unet import PIXEL_ATTENTION, RESNET, pixel_attention_2022


def half(side: str) -> list[tuple[str, str]]:
    """What encoder and decoder have in common."""
    rows = same(f"{side}.conv_in", f"{side}.conv_out")
    rows += [(f"{side}.conv_norm_out", f"{side}.norm_out")]
    rows += nested(f"{side}.mid_block.resnets.{{}}", f"{side}.mid.resnets.{{}}", RESNET)
    rows += nested(f"{side}.mid_block.attentions.{{}}", f"{side}.mid.attentions.{{}}", PIXEL_ATTENTION)
    return rows


AUTOENCODER = [
    *half("encoder"),
    *nested("encoder.down_blocks.{}.resnets.{}", "encoder.down.{}.resnets.{}", RESNET),
    ("encoder.down_blocks.{}.downsamplers.0.conv", "encoder.down.{}.resample.conv"),
    *half("decoder"),
    *nested("decoder.up_blocks.{}.resnets.{}", "decoder.up.{}.resnets.{}", RESNET),
    ("decoder.up_blocks.{}.upsamplers.0.conv", "decoder.up.{}.resample.conv"),
    *same("quant_conv", "post_quant_conv"),
]

OF_2022 = pixel_attention_2022([f"{side}.mid_block.attentions.{{}}" for side in ("encoder", "decoder")])

AUTOENCODER_KL = Table(AUTOENCODER, aliases=OF_2022)

VQ_MODEL = Table([*AUTOENCODER, ("quantize.embedding", "codebook")], aliases=OF_2022)

# Layers have the numbers of their place in a sequence, in ours too
AUTOENCODER_TINY = Table(
    [row for side in ("encoder", "decoder") for row in same(f"{side}.layers.{{}}", f"{side}.layers.{{}}.conv.{{}}")]
)
