"""The first text-to-image latent diffusion, its encoder and tokenizer, and the tiny VAE, beside the reference."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel as ReferenceBert
from layouts import make_folder
from reference import difference, narrow_config, randomize, twins
from test_first_systems import VQ, compare
from test_models import noise
from test_pipelines import PICTURE, PROMPT, both, seeded

import minidiff
from weights_compat import TABLES

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "b", "##c", "cat", "##s", "dog", "un", "##want", "##ed", ",", ".", "é", "e"),
    *("photo", "##graph", "of", "horse", "猫"),
]
TEXTS = ["A cats, unwanted é dog.", "photograph of 猫 horse", "", "zzz [MASK] a\tb  b", "dog " * 90]
BERT = {
    "vocab_size": len(WORDS),
    "encoder_layers": 2,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "head_dim": 4,
    "d_model": 16,
}

FOUR_LEVELS = {  # the reference divides sizes by 8
    "latent_channels": 4,
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours and the reference's, of a folder of 2022: vocab.txt."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "tokenizer_class": "BertTokenizer", "model_max_length": 77, "use_fast": true}'
    )
    return minidiff.BertTokenizer.from_pretrained(folder), transformers.BertTokenizer.from_pretrained(folder)


def bert():
    reference = randomize(ReferenceBert(LDMBertConfig(**BERT)), seed=3)
    ours = minidiff.LDMBertModel(**BERT)
    table = TABLES["LDMBertModel"]
    ours.load_state_dict({table.ours(name): tensor.clone() for name, tensor in reference.state_dict().items()})
    return ours.eval(), reference


def test_tokens(tokenizers, tmp_path):
    ours, reference = tokenizers
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    expected = reference(TEXTS, **options).input_ids
    assert torch.equal(ours(TEXTS, **options).input_ids, expected)
    assert ours(TEXTS[0]).input_ids == reference(TEXTS[0]).input_ids
    for i, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(i))
        for cls in (minidiff.BertTokenizer, transformers.BertTokenizer):
            assert torch.equal(cls.from_pretrained(tmp_path / str(i))(TEXTS, **options).input_ids, expected)


@torch.no_grad()
def test_text_encoder():
    ours, reference = bert()
    ids = torch.randint(len(WORDS), (2, 77), generator=seeded())
    assert difference(ours(ids)[0], reference(ids)[0]) <= 5e-6
    with pytest.raises(ValueError, match="input_ids has shape"):
        ours(torch.zeros(1, 78).long())


@pytest.fixture(scope="module")
def ldm(tokenizers):
    _, config = narrow_config("stable-diffusion-v1-5", "unet")
    models = {
        "vqvae": twins("VQModel", VQ | FOUR_LEVELS)[::-1],
        "unet": twins("UNet2DConditionModel", config | {"cross_attention_dim": BERT["d_model"], "sample_size": 8})[
            ::-1
        ],
        "bert": bert(),
        "tokenizer": tokenizers,
    }
    pipes = []
    for i, library in enumerate((minidiff, diffusers)):
        parts = {name: pair[i] for name, pair in models.items()}
        pipes.append(library.LDMTextToImagePipeline(**parts, scheduler=library.DDIMScheduler(clip_sample=False)))
        pipes[-1].set_progress_bar_config(disable=True)
    return pipes


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 6.0},
        {"guidance_scale": 0.5, "prompt": ["a cat", "a dog"]},
        {"guidance_scale": 3.0, "eta": 0.7},
    ],
)
def test_text_to_image(ldm, arguments):
    compare(
        ldm, **{"prompt": "a photograph of a cat", "num_inference_steps": 4, "height": 64, "width": 48, **arguments}
    )


def test_ldm_saves(ldm, tmp_path):
    run = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 4.0, "output_type": "np"}
    expected = ldm[0]("a cat", generator=seeded(), **run).images
    for i, pipe in enumerate(ldm):
        pipe.save_pretrained(tmp_path / str(i))
        for library in (minidiff, diffusers):
            again = library.DiffusionPipeline.from_pretrained(tmp_path / str(i))
            assert np.abs(again("a cat", generator=seeded(), **run).images - expected).max() <= PICTURE
    with pytest.raises(ValueError, match="noise levels"):
        minidiff.LDMTextToImagePipeline(**ldm[0].components | {"scheduler": minidiff.LMSDiscreteScheduler()})("a cat")


TINY = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"act_fn": "silu", "latent_channels": 16}])
def test_tiny_vae(more):
    reference, ours = twins("AutoencoderTiny", TINY | more)
    x = noise(2, 3, 40, 24)
    latents = reference.encode(x).latents
    assert difference(ours.encode(x).latents, latents) <= 5e-6
    assert difference(ours.decode(latents).sample, reference.decode(latents).sample) <= 5e-6
    assert difference(ours.scale_latents(latents), reference.scale_latents(latents)) <= 1e-6
    assert difference(ours(x).sample, reference(x).sample) <= 1e-4
    with pytest.raises(ValueError, match="x has shape"):
        ours.decode(x)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 176), (200, 64), (136, 152)])
def test_tiny_vae_in_tiles(size):
    """At tiles of 64 pixels in place of 512, at the reference's overlap for both: an eighth would be one latent."""
    reference, ours = twins("AutoencoderTiny", TINY)
    x = noise(2, 3, *size)
    for vae in (ours, reference):
        vae.enable_tiling()
        vae.enable_slicing()
        vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 64, 8, 0.25
    latents = reference.encode(x).latents
    assert difference(ours.encode(x).latents, latents) <= 5e-6
    assert difference(ours.decode(latents).sample, reference.decode(latents).sample) <= 5e-6
    assert ours.encode(x[:, :, :-4, :-4]).latents.shape == latents.shape  # where the reference fails
    ours.disable_tiling()
    assert difference(ours.encode(x).latents, latents) > 1e-3
    ours.enable_tiling()
    ours.tile_overlap_factor = 0.125
    with pytest.raises(ValueError, match=r"tile_overlap_factor=0\.125 begin 56 apart and have 8 in common"):
        ours.encode(x)
    assert minidiff.AutoencoderTiny(**TINY).tile_latent_min_size == 64


def test_tiny_vae_in_place_of_the_vae(tmp_path):
    pipes = both(make_folder("stable-diffusion-v1-5", tmp_path / "sd"))
    tiny = twins("AutoencoderTiny", TINY)[::-1]
    run = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}
    pictures = []
    for pipe, library, vae in zip(pipes, (minidiff, diffusers), tiny, strict=True):
        parts = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "unet", "scheduler")}
        parts |= {"vae": vae, "safety_checker": None, "feature_extractor": None}
        for name, more in (("", {}), ("Img2Img", {"image": noise(1, 3, 64, 64).clamp(-1, 1), "strength": 1.0})):
            made = getattr(library, f"StableDiffusion{name}Pipeline")(**parts)
            made.set_progress_bar_config(disable=True)
            own = run if not name else {key: run[key] for key in ("num_inference_steps", "output_type")}
            pictures.append(made(PROMPT, generator=seeded(), **own, **more).images)
    assert np.abs(pictures[0] - pictures[2]).max() <= PICTURE
    assert np.abs(pictures[1] - pictures[3]).max() <= PICTURE
