"""What the test files share: one thread, hypothesis without chance, and tiny folders in the Hub's layout."""

import json

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import minidiff as m

torch.set_num_threads(1)
# Derandomized: the same cases on every machine and on every day. A test may raise or lower the number of examples.
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    phases=set(Phase) - {Phase.explain},  # which takes minutes where a test has a model in it
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    """The notebooks first: they take longest, and at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.path.stem != "test_notebooks")


BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68))]
MERGES = [("a", "p"), ("r", "e"), ("re", "d</w>"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>")]
TOKENS = [*BYTES, *(byte + "</w>" for byte in BYTES), *("".join(pair) for pair in MERGES)]
START, END = "<|startoftext|>", "<|endoftext|>"

UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
}


def tiny_tokenizer():
    """All bytes and six merges ("red", "apple"), 16 tokens at most."""
    vocab = {token: index for index, token in enumerate([*TOKENS, START, END])}
    return m.CLIPTokenizer(vocab, MERGES, model_max_length=16)


def tiny_text_encoder():
    size = len(TOKENS) + 2
    return m.CLIPTextModel(
        vocab_size=size,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=size - 1,
    )


def tiny_unet2d_condition():
    return m.UNet2DConditionModel(
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def tiny_unet2d():
    return m.UNet2DModel(
        **UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def tiny_vae():
    return m.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )


def seeded(build):
    """A model with the first weights of seed 0, whatever was drawn before; the global random state stays."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory):
    """A StableDiffusionPipeline of 16 x 16 pixels (latents 4 x 8 x 8). Shared by all tests: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    m.StableDiffusionPipeline(
        vae=seeded(tiny_vae),
        text_encoder=seeded(tiny_text_encoder),
        tokenizer=tiny_tokenizer(),
        unet=seeded(tiny_unet2d_condition),
        scheduler=m.PNDMScheduler(**STABLE_DIFFUSION),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ddpm_folder(tmp_path_factory):
    """A DDPMPipeline of 3 x 8 x 8 pixels. Shared by all tests: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "ddpm"
    m.DDPMPipeline(seeded(tiny_unet2d), m.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_models():
    """Each kind of model, tiny, in float32 with the weights of seed 0; new for each test."""
    return {
        "AutoencoderKL": seeded(tiny_vae),
        "CLIPTextModel": seeded(tiny_text_encoder),
        "UNet2DConditionModel": seeded(tiny_unet2d_condition),
        "UNet2DModel": seeded(tiny_unet2d),
    }


@pytest.fixture
def edit_json():
    """edit_json(file, key=value, ...) changes keys of a JSON file."""

    def edit(file, **changes):
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return edit
