"""LoRA beside the reference with peft: every spelling of files, pictures, fused weights, and files that don't fit."""

import copy
import itertools
import re
import threading

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from layouts import make_folder
from safetensors.torch import load_file, save_file
from test_pipelines import PROMPT, agree, draw, seeded
from torch._dynamo.testing import CompileCounter

import minidiff
from minidiff import LoadError, lora
from minidiff.loading.tensors import read_header
from weights_compat import TABLES
from weights_compat.lora import originals, spellings, split
from weights_compat.manifests import read_manifest

SCALES = (0.0, 0.5, 1.0, -1.0)
LOADED = []  # each pair of pipelines, and the weights of ours


def both(repository, folder):
    make_folder(repository, folder)
    options = {} if "xl" in repository else {"safety_checker": None, "feature_extractor": None}
    ours = minidiff.DiffusionPipeline.from_pretrained(folder, **options)
    reference = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **options)
    for pipe in (ours, reference):
        pipe.set_progress_bar_config(disable=True)
    LOADED.append(((ours, reference), {name: tensor.clone() for name, tensor in tensors(ours).items()}))
    return ours, reference


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sd") / "folder"


@pytest.fixture(scope="module")
def sd(sd_folder):
    return both("stable-diffusion-v1-5", sd_folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return both("stable-diffusion-xl-base-1.0", tmp_path_factory.mktemp("xl") / "folder")


@pytest.fixture
def tiny(tiny_sd_folder):
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def as_before():
    """Each test ends without adapters, and ours with the weights that it was loaded with, bit for bit."""
    yield
    for (ours, reference), old in LOADED:
        for pipe in (ours, reference):
            pipe.enable_lora()
            pipe.unfuse_lora()
            pipe.unload_lora_weights()
        vars(reference).pop("_lora_scale", None)  # a call's, by which it would scale what the text encoder loads next
        new = tensors(ours)
        assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in old)
        assert not any(lora.adapted(model) for model in models(ours).values())


def models(pipe):
    return {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)}


def tensors(pipe):
    return {f"{name}.{key}": t for name, model in models(pipe).items() for key, t in model.state_dict().items()}


def attention(hub):
    return "attn" in hub


def write(pipe, spelling, rank, alpha=None, seed=0, size=0.1, chosen=lambda hub: True):
    """The tensors of a LoRA, random, as a file of that kind would have them."""
    generator, file = torch.Generator().manual_seed(seed), {}
    for component, model in models(pipe).items():
        for _, hub, layer in lora.layers(model):
            if not chosen(hub):
                continue
            W = layer.weight.shape
            a, b, alpha_key = SPELLINGS[spelling](component, hub)
            file[a] = size * torch.randn(rank, *W[1:], generator=generator)
            file[b] = size * torch.randn(W[0], rank, *[1] * (len(W) - 2), generator=generator)
            if alpha_key and alpha is not None:
                file[alpha_key] = torch.tensor(float(alpha(hub) if callable(alpha) else alpha))
    return file


def peft_names(component, hub):
    return f"{component}.{hub}.lora_A.weight", f"{component}.{hub}.lora_B.weight", None


def diffusers_names(component, hub):
    layer = f"{component}.{hub}.{'lora' if component == 'unet' else 'lora_linear_layer'}"
    return f"{layer}.down.weight", f"{layer}.up.weight", None


def processor_names(component, hub):
    """Attention alone: `attn1.processor.to_q_lora`, and in text encoders `self_attn.to_q_lora`."""
    short = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    place, _, last = hub.replace(".to_out.0", ".to_out").rpartition(".")
    place = f"{component}.{place}.processor" if component == "unet" else f"{component}.{place}"
    return *(f"{place}.{short.get(last, last)}_lora.{way}.weight" for way in ("down", "up")), None


def kohya_names(component, hub, xl=False):
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    name = original(hub) if xl and component == "unet" else hub  # XL's UNet was trained under its authors' names
    layer = f"{prefix[component]}_{name.replace('.', '_')}"
    return f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"


ORIGINAL = originals(read_manifest("stable-diffusion-xl-base-1.0").config("unet"))


def original(hub):
    ours = TABLES["UNet2DConditionModel"].ours(f"{hub}.weight")
    return ORIGINAL.hub(ours).removesuffix(".weight")


SPELLINGS = {
    "peft": peft_names,
    "diffusers": diffusers_names,
    "processor": processor_names,
    "kohya": kohya_names,
    "kohya xl": lambda component, hub: kohya_names(component, hub, xl=True),
}


def load(pipes, file, **options):
    for pipe in pipes:
        pipe.load_lora_weights(dict(file), **options)


def compare(pipes, base=None, **arguments):
    """Both draw the same; and, beside `base`, something else."""
    mine, theirs = (draw(pipe, **{"prompt": PROMPT, "num_inference_steps": 2} | arguments) for pipe in pipes)
    agree(mine, theirs)
    if base is not None:
        assert np.abs(mine[0] - base[0]).mean() > 1e-3
    return mine


CASES = [
    ("sd", "peft", 1, None),
    ("sd", "diffusers", 4, None),
    ("sd", "processor", 16, None),
    ("sd", "kohya", 64, 8),
    ("sd", "kohya", 8, lambda hub: 2 if "conv" in hub else 4),  # LoCon has an alpha of its own for convolutions
    ("sd", "kohya", 3, None),
    ("xl", "kohya xl", 4, 1),
    ("xl", "peft", 32, None),
]


@pytest.mark.parametrize(("system", "spelling", "rank", "alpha"), CASES)
def test_pictures_of_every_spelling(request, system, spelling, rank, alpha):
    pipes = request.getfixturevalue(system)
    base = compare(pipes)
    chosen = attention if spelling == "processor" else lambda hub: True
    load(pipes, write(pipes[0], spelling, rank, alpha, size=0.1 / rank**0.25, chosen=chosen))
    assert pipes[0].get_active_adapters() == pipes[1].get_active_adapters() == ["default_0"]
    assert pipes[0].get_list_adapters() == pipes[1].get_list_adapters()
    for scale in SCALES:
        mine = compare(pipes, base if scale else None, cross_attention_kwargs={"scale": scale})
        assert scale or np.abs(mine[0] - base[0]).max() == 0


def test_adapters_mixed_off_fused_and_gone(sd):
    base = compare(sd)
    load(sd, write(sd[0], "peft", 4), adapter_name="one")
    alone = compare(sd, base)
    load(sd, write(sd[0], "kohya", 8, 4, seed=1), adapter_name="two")
    compare(sd, alone)  # the last one loaded is active, and no other
    for weights in ([0.5, -1.0], [2.0, None], 0.7, [{"unet": 0.3}, {"text_encoder": 0.0}]):
        for pipe in sd:
            pipe.set_adapters(["one", "two"], copy.deepcopy(weights))
        mixed = compare(sd, base)
    compare(sd, mixed, cross_attention_kwargs={"scale": 0.5})
    for pipe in sd:
        pipe.disable_lora()
    assert np.abs(compare(sd)[0] - base[0]).max() == 0
    for pipe in sd:
        pipe.enable_lora()
        pipe.delete_adapters("two")
    assert sd[0].get_active_adapters() == sd[1].get_active_adapters() == ["one"]
    compare(sd, mixed)
    for pipe in sd:
        pipe.delete_adapters(["one"])
    assert np.abs(compare(sd)[0] - base[0]).max() == 0


def test_weights_by_block(sd):
    weights = {"unet": {"down": 0.2, "mid": 0.0, "up": {"block_1": [0.1, 0.2, 0.3], "block_2": 4}}, "text_encoder": 0.3}
    load(sd, write(sd[0], "peft", 4, chosen=lambda hub: "_block" in hub or "text_model" in hub), adapter_name="one")
    base = compare(sd)
    for weight in (weights, {"unet": {"up": 2, "mid": [0.5], "down": [3.0, 0.0]}}, {"unet": None}):
        for pipe in sd:
            pipe.set_adapters("one", copy.deepcopy(weight))
        compare(sd, base if weight["unet"] else None)
        assert strengths(sd[0]) == {  # of convolutions too, and of blocks without attention
            f"{component}.{name.removeprefix('text_model.')}": module.scaling["one"]
            for component, model in models(sd[1]).items()
            for name, module in model.named_modules()
            if "one" in getattr(module, "scaling", ())
        }


def test_a_weight_of_a_component_that_a_file_leaves_out_is_a_warning(sd):
    load(sd[:1], write(sd[0], "peft", 1, chosen=lambda hub: "attn2" in hub), adapter_name="one")
    with pytest.warns(UserWarning, match="adapter_weights: one has no tensors for text_encoder"):
        sd[0].set_adapters("one", {"unet": 0.5, "text_encoder": 2})
    assert {*strengths(sd[0]).values()} == {0.5}


def strengths(pipe):
    return {
        f"{component}.{hub.removeprefix('text_model.')}": layer.adapters["one"].strength
        for component, model in models(pipe).items()
        for _, hub, layer in lora.layers(model)
        if isinstance(layer, lora.Adapted)
    }


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"unet": {"down": {"block_1": [1, 2, 3]}}}, "['unet']['down']['block_1'] has 3 weights; it takes 2"),
        ({"unet": {"up": [1, 2]}}, "['unet']['up']['block_1'] has 2 weights; it takes 3"),
        ({"unet": {"mid": [1, 2]}}, "['unet']['mid'] has 2 weights; it takes 1"),
        ({"unet": {"dwn": 1}}, "['unet'] has dwn; it may have mid, down, up"),
        ({"unet": {"down": {"block_3": 1}}}, "['unet']['down'] has block_3; it may have block_0, block_1, block_2"),
        ({"unett": 1, 5: 1}, " has unett, 5; it may have unet, text_encoder"),
        ({"text_encoder": {"down": 1}}, "['text_encoder'] has down; it may have no parts"),
        ({"unet": {"mid": float("nan")}}, "['unet']['mid']=nan must be finite"),
    ],
)
def test_weights_without_a_place(sd, weight, message):
    load(sd[:1], write(sd[0], "peft", 1), adapter_name="one")
    sd[0].set_adapters("one", 0.5)
    with pytest.raises(ValueError, match=re.escape(f"adapter_weights{message}")):
        sd[0].set_adapters("one", weight)
    assert {*strengths(sd[0]).values()} == {0.5}


@pytest.mark.parametrize("system", ["sd", "xl"])
def test_fused_and_back_bit_for_bit(request, system):
    pipes = request.getfixturevalue(system)
    load(pipes, write(pipes[0], "peft", 4), adapter_name="one")
    load(pipes, write(pipes[0], "peft", 2, seed=1), adapter_name="two")
    for pipe in pipes:
        pipe.set_adapters(["one", "two"], [1.0, -0.5])
    loose, before = compare(pipes), {name: tensor.clone() for name, tensor in tensors(pipes[0]).items()}
    for pipe in pipes:
        pipe.fuse_lora(lora_scale=0.5)
    fused = compare(pipes, loose)
    assert np.array_equal(compare(pipes, cross_attention_kwargs={"scale": 3.0})[0], fused[0])  # what is fused is fixed
    pipes[0].unfuse_lora()
    after = tensors(pipes[0])
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert np.array_equal(draw(pipes[0], prompt=PROMPT, num_inference_steps=2)[0], loose[0])


def test_fusing_keeps_the_files_mapping(sd):
    """The weights without adapters are those of the mapped file, no copy: they take no memory of their own."""
    load(sd[:1], write(sd[0], "peft", 4))
    layers = lora.adapted(sd[0].unet)
    places = [layer.weight.data_ptr() for layer in layers]
    sd[0].fuse_lora(components="unet")
    assert [layer.base.data_ptr() for layer in layers] == places
    assert not any(layer.fused for layer in lora.adapted(sd[0].text_encoder))
    sd[0].unfuse_lora()
    assert [layer.weight.data_ptr() for layer in layers] == places


def test_fused_then_unloaded_stays(sd, sd_folder, tmp_path):
    """As the reference's documentation has it: then the pipeline is one without LoRA, and can be saved."""
    pipes = [sd[0].from_pretrained(sd_folder, safety_checker=None, feature_extractor=None), copy.deepcopy(sd[1])]
    load(pipes, write(pipes[0], "peft", 4))
    with pytest.raises(ValueError, match=r"LoRA .default_0. beside its weights.*save_lora_weights"):
        pipes[0].save_pretrained(tmp_path / "loose")
    assert not (tmp_path / "loose").exists()
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    drawn = compare(pipes, compare(sd))
    pipes[0].save_pretrained(tmp_path / "fused")
    again = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path / "fused", safety_checker=None)
    assert np.array_equal(draw(again, prompt=PROMPT, num_inference_steps=2)[0], drawn[0])


@pytest.mark.parametrize("component", ["unet", "text_encoder"])  # the first and the last
def test_a_refused_fuse_fuses_nothing(sd, component):
    file = write(sd[0], "peft", 4)
    next(tensor for key, tensor in file.items() if key.startswith(f"{component}."))[0] = float("nan")
    load(sd[:1], file)
    with pytest.raises(ValueError, match="safe_fusing: default_0"):
        sd[0].fuse_lora(safe_fusing=True)
    assert not any(layer.fused for model in models(sd[0]).values() for layer in lora.adapted(model))


def test_deleting_one_switches_no_other_on(sd):
    """`off` is off where `gone` is active, where `gone` never was, and where nothing is active."""
    load(sd, write(sd[0], "peft", 2), adapter_name="off")
    load(sd, write(sd[0], "peft", 2, seed=1), adapter_name="kept")
    load(sd, write(sd[0], "peft", 2, seed=2, chosen=lambda hub: "text_model" not in hub), adapter_name="gone")
    for pipe in sd:
        pipe.set_adapters(["kept", "gone"])
        pipe.delete_adapters("gone")
    assert sd[0].get_active_adapters() == ["kept"]
    compare(sd)
    load(sd[:1], write(sd[0], "peft", 2, seed=2, chosen=lambda hub: "text_model" in hub), adapter_name="gone")
    lora.activate(sd[0].unet, ())
    sd[0].delete_adapters("gone")
    assert not any(layer.active for layer in lora.adapted(sd[0].unet))
    sd[0].set_adapters("kept")
    lora.activate(sd[0].unet, ())
    sd[0].delete_adapters("off")
    assert not any(layer.active for layer in lora.adapted(sd[0].unet))


def test_what_is_fused_is_unfused_first(sd):
    """What was fused drew on alone, whatever came beside it or left."""
    pipe, file = sd[0], write(sd[0], "peft", 2)
    load([pipe], file, adapter_name="one")
    pipe.fuse_lora(components=["unet"])
    before = draw(pipe, prompt=PROMPT, num_inference_steps=1)[0]
    for call in (
        lambda: pipe.load_lora_weights(file),
        lambda: pipe.set_adapters("one", 0.5),
        lambda: pipe.delete_adapters("one"),
        lambda: lora.add(pipe.unet),
    ):
        with pytest.raises(ValueError, match="one is fused: unfuse_lora or unload_lora_weights first"):
            call()
    assert np.array_equal(draw(pipe, prompt=PROMPT, num_inference_steps=1)[0], before)
    pipe.unfuse_lora()
    load([pipe], file)
    assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.parametrize(
    "options", [{}, {"lora_alpha": 8}, {"lora_alpha": 2, "use_rslora": True}, {"alpha_pattern": 1}]
)
def test_files_that_the_reference_trained(sd, sd_folder, options, tmp_path):
    """With peft's config in the header, which says alpha."""
    if "alpha_pattern" in options:
        options = {"lora_alpha": 4, "alpha_pattern": {"attn2.to_k": 16}, "rank_pattern": {"attn2.to_q": 2}}
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_out.0"]} | options)
    trained = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, feature_extractor=None)
    trained.set_progress_bar_config(disable=True)
    trained.unet.add_adapter(config)
    generator = seeded(3)
    for name, parameter in trained.unet.named_parameters():
        if "lora" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    layers = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(trained.unet))
    says = _collate_lora_metadata({"unet": trained.unet})
    trained.save_lora_weights(tmp_path, unet_lora_layers=layers, **says)
    base = draw(sd[0], prompt=PROMPT, num_inference_steps=2)
    for pipe in sd:
        pipe.load_lora_weights(tmp_path)
    compare(sd, base)
    compare((sd[0], trained), base)


def test_what_is_trained_here_loads_there(sd, tmp_path):
    torch.manual_seed(0)
    unet, text_encoder = sd[0].unet, sd[0].text_encoder
    trained = lora.add(unet, rank=3, targets=("attn2.to_k", "conv1", "out"))  # the Hub's names and ours
    trained += lora.add(text_encoder, rank=2)
    base = draw(sd[1], prompt=PROMPT, num_inference_steps=2)
    assert np.array_equal(draw(sd[0], prompt=PROMPT, num_inference_steps=2)[0], compare(sd)[0])
    assert {id(p) for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad} == {
        *map(id, trained)
    }
    for parameter in trained:
        parameter.data.normal_(std=0.2)
    sd[0].save_lora_weights(tmp_path, unet, text_encoder)
    sd[1].load_lora_weights(tmp_path, adapter_name="default")
    drawn = compare(sd, base)
    sd[0].unload_lora_weights()
    unet.requires_grad_(True), text_encoder.requires_grad_(True)
    sd[0].load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors")
    assert np.array_equal(draw(sd[0], prompt=PROMPT, num_inference_steps=2)[0], drawn[0])


def test_alpha_is_each_layers_own(sd):
    """Kohya's files say it layer by layer. The reference counts which alpha is the most frequent, and gives that one to
    every attention of the UNet; so no picture of its is beside this one, but W + (alpha / r) B A is."""

    def alpha(hub):
        return 1 + len(hub) % 5

    file = write(sd[0], "kohya", 4, alpha)
    weights = {}
    for component in ("unet", "text_encoder"):
        for _, hub, layer in lora.layers(getattr(sd[0], component)):
            A, B, _ = (file[name] for name in kohya_names(component, hub))
            weights[component, hub] = layer.weight + alpha(hub) / 4 * torch.einsum("or...,ri...->oi...", B, A)
    load(sd[:1], file)
    sd[0].fuse_lora()
    for (component, hub), expected in weights.items():
        found = getattr(sd[0], component).get_submodule(TABLES_OURS[component](hub)).weight
        assert torch.allclose(found, expected, atol=1e-6), hub


TABLES_OURS = {
    component: lambda hub, name=name: TABLES[name].ours(f"{hub}.weight").removesuffix(".weight")
    for component, name in (("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel"))
}


@pytest.mark.parametrize(
    "repository", ["stable-diffusion-v1-5", "stable-diffusion-2-1", "stable-diffusion-xl-base-1.0"]
)
def test_no_two_layers_share_a_spelling(repository):
    manifest = read_manifest(repository)
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if component not in manifest.index:
            continue
        config = getattr(minidiff, manifest.index[component][1]).Config.read(manifest.config(component))
        table, owners = originals(config), {}
        for hub in (name.removesuffix(".weight") for name in manifest.tensors[component] if "weight" in name):
            ours = TABLES[manifest.index[component][1]].ours(f"{hub}.weight")
            there = table and table.hub(ours).removesuffix(".weight")
            assert table is None or there
            for spelling in spellings(hub, there):
                assert owners.setdefault(spelling, hub) == hub
            for names in (peft_names, diffusers_names, kohya_names):
                assert {split(key)[1] for key in names(component, hub) if key} <= spellings(hub)


# One pipeline, many callers


def test_threads_have_their_own_scale(tiny):
    load([tiny], write(tiny, "peft", 4))
    alone = {scale: scaled(tiny, scale) for scale in SCALES}
    drawn, together = {}, threading.Barrier(len(SCALES))

    def work(scale):
        together.wait(timeout=60)
        drawn[scale] = scaled(tiny, scale)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in SCALES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(drawn[scale], alone[scale]) for scale in SCALES)


def scaled(pipe, scale, **options):
    return draw(pipe, prompt=PROMPT, num_inference_steps=2, cross_attention_kwargs={"scale": scale}, **options)[0]


def test_a_run_inside_a_callback_has_its_own_scale(tiny):
    load([tiny], write(tiny, "peft", 4))
    whole, half = scaled(tiny, 1.0), scaled(tiny, 0.5)
    inside = []

    def callback(pipe, i, t, tensors):
        inside.append(
            pipe(PROMPT, num_inference_steps=2, height=64, width=64, generator=seeded(), output_type="np").images
        )
        assert pipe.cross_attention_kwargs == {"scale": 0.5}

    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "generator": seeded()}
    outer = tiny(PROMPT, cross_attention_kwargs={"scale": 0.5}, callback_on_step_end=callback, **options).images
    assert np.array_equal(outer, half) and np.array_equal(inside[0], whole)


def test_encode_prompt_takes_a_scale(sd):
    load(sd, write(sd[0], "peft", 4))
    for scale in (None, 0.0, 0.5):
        one, other = (pipe.encode_prompt(PROMPT, "cpu", 1, True, lora_scale=scale) for pipe in sd)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_copies_are_apart(tiny):
    load([tiny], write(tiny, "peft", 4))
    base, twin = draw(tiny, prompt=PROMPT), copy.deepcopy(tiny)
    assert np.array_equal(draw(twin, prompt=PROMPT)[0], base[0])
    twin.fuse_lora()
    twin.unload_lora_weights()
    assert np.array_equal(draw(tiny, prompt=PROMPT)[0], base[0])


def test_other_pipelines_share_adapters(sd):
    load(sd, write(sd[0], "peft", 4))
    image = torch.rand(1, 3, 64, 64, generator=seeded(5))
    results = []
    for library, pipe in zip((minidiff, diffusers), sd, strict=True):
        made = library.StableDiffusionImg2ImgPipeline(**parts(pipe))
        made.set_progress_bar_config(disable=True)
        options = {"image": image, "num_inference_steps": 4, "generator": seeded(), "output_type": "np"}
        results.append(made(PROMPT, cross_attention_kwargs={"scale": 0.5}, **options).images)
    assert np.abs(results[0] - results[1]).max() <= 1e-4


def parts(pipe):
    return {name: part for name, part in pipe.components.items() if not isinstance(part, bool)}


def test_pix2pix_scales_the_unet_alone(sd):
    load(sd, write(sd[0], "peft", 4, chosen=lambda hub: "text_model" in hub))
    image = torch.rand(1, 3, 64, 64, generator=seeded(5))
    results = []
    for library, pipe in zip((minidiff, diffusers), sd, strict=True):
        config = {key: value for key, value in pipe.unet.config.items() if key[0] != "_"} | {"in_channels": 8}
        unet = library.UNet2DConditionModel.from_config(config)
        source = sd[1].unet.state_dict()
        source["conv_in.weight"] = torch.cat([source["conv_in.weight"]] * 2, dim=1)
        unet.load_state_dict(source)
        made = library.StableDiffusionInstructPix2PixPipeline(**parts(pipe) | {"unet": unet.eval()})
        made.set_progress_bar_config(disable=True)
        options = {"image": image, "num_inference_steps": 2, "generator": seeded(), "output_type": "np"}
        results.append(made(PROMPT, cross_attention_kwargs={"scale": 0.0}, **options).images)
    assert np.abs(results[0] - results[1]).max() <= 1e-4


@pytest.mark.parametrize("switch", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("first", [True, False])
def test_offloaded(tiny, switch, first):
    file = write(tiny, "peft", 4)
    load([tiny], file)
    expected = draw(tiny, prompt=PROMPT)[0]
    if not first:
        tiny.unload_lora_weights()
    getattr(tiny, switch)(device="cpu")
    if not first:
        load([tiny], file)
    try:
        assert np.array_equal(draw(tiny, prompt=PROMPT)[0], expected)
    finally:
        tiny.remove_all_hooks()


def test_compiled_networks_see_every_change():
    unet = minidiff.UNet2DConditionModel(
        **{"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "mid_block_type": None},
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        **{"cross_attention_dim": 8, "attention_head_dim": 2},
    ).eval()
    counter, generator = CompileCounter(), seeded()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    noise, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)

    @torch.no_grad()
    def seen():
        both = [network(noise, torch.tensor(5.0), states).sample for network in (unet, compiled)]
        assert torch.equal(*both)
        return both[0]

    base = seen()
    for parameter in lora.add(unet, targets=("q", "conv1")):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    loose = seen()
    assert counter.frame_count == 2 and not torch.allclose(loose, base)
    with lora.scaled(0.5):
        assert not torch.allclose(seen(), loose)
    lora.fuse(unet, 0.25)
    assert not torch.allclose(seen(), loose)
    lora.unfuse(unet)
    assert torch.equal(seen(), loose)
    lora.remove(unet, "default")
    assert torch.equal(seen(), base)


def test_adapters_follow_their_layers(tiny):
    twin = copy.deepcopy(tiny)
    twin.unet.to(torch.bfloat16)
    load([twin], write(twin, "peft", 4))
    assert {one.dtype for layer in lora.adapted(twin.unet) for one in layer.adapters.parameters()} == {torch.bfloat16}
    twin.fuse_lora()
    twin.unet.to(torch.float32)
    twin.unfuse_lora()
    assert {p.dtype for p in twin.unet.parameters()} == {torch.float32}


# Files that don't fit


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def changed(**changes):
    """Of a LoRA's tensors: {name: None} takes one away."""

    def change(tensors):
        return {key: value for key, value in (tensors | changes).items() if value is not None}

    return change


A, B = "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"
DAMAGED = {
    "another model's": (
        lambda t: {f"transformer.{key}": value for key, value in t.items()},
        "tensors fit no layer.*transformer",
    ),
    "one key too many": (
        changed(**{"unet.conv_up.lora_A.weight": torch.ones(1)}),
        "1 of .* tensors fit no layer.*conv_up",
    ),
    "a text encoder too many": (changed(**{"text_encoder_2.x.lora_A.weight": torch.ones(1)}), "text_encoder_2.x"),
    "empty": (lambda t: {}, "0 of 0 tensors"),
    "weights of a UNet": (lambda t: {"conv_in.weight": torch.ones(4, 4)}, "Is it LoRA.*conv_in.weight"),
    "A alone": (changed(**{B: None}), "unet.conv_in has A alone"),
    "wrong width": (changed(**{A: torch.ones(4, 5, 3, 3)}), r"unet.conv_in has A of \(4, 5, 3, 3\)"),
    "two ranks": (changed(**{A: torch.ones(5, 4, 3, 3)}), "unet.conv_in has A of"),
    "flat": (changed(**{A: torch.ones(4)}), "unet.conv_in has A of"),
    "no dimension": (changed(**{A: torch.tensor(1.0)}), "unet.conv_in has A of"),
    "no rank": (changed(**{A: torch.ones(0, 4, 3, 3), B: torch.ones(32, 0, 1, 1)}), "unet.conv_in has A of"),
    "integers": (changed(**{A: torch.ones(4, 4, 3, 3, dtype=torch.int64)}), "is torch.int64"),
    "DoRA": (changed(**{"unet.conv_in.lora_magnitude_vector": torch.ones(4)}), "belongs to DoRA"),
    "DoRA of kohya": (changed(**{"lora_unet_conv_in.dora_scale": torch.ones(4)}), "belongs to DoRA"),
    "LoKr": (changed(**{"lora_unet_conv_in.lokr_w1": torch.ones(4)}), "belongs to LyCORIS"),
    "twice": (changed(**{"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4, 3, 3)}), "comes twice"),
    "alpha of two": (changed(**{"lora_unet_conv_in.alpha": torch.ones(2)}), "alpha=nan"),
    "a number for a name": (lambda t: t | {5: torch.ones(4)}, "1 of .* tensors fit no layer.*: 5$"),
    "alpha infinite": (changed(**{"lora_unet_conv_in.alpha": torch.tensor(float("inf"))}), "alpha=inf"),
}


KINDS = itertools.cycle(["safetensors", "bin", "given"])


@pytest.mark.parametrize(("fault", "kind"), zip(DAMAGED, KINDS, strict=False))
def test_a_file_that_does_not_fit_changes_nothing(sd, fault, kind, tmp_path):
    change, message = DAMAGED[fault]
    refused(sd[0], lambda: change(write(sd[0], "peft", 4)), kind, message, tmp_path)


def refused(pipe, make, kind, message, tmp_path):
    """One error that names the file; afterwards the pipeline is as it was, with the adapter that it had."""
    load([pipe], write(pipe, "peft", 2, seed=9), adapter_name="there")
    before = copy.deepcopy(models(pipe))
    file = tmp_path / f"file.{kind}"
    source = make()
    if kind == "safetensors":
        save_file(source, file)
    elif kind == "bin":
        torch.save(source, file)
    with pytest.raises(LoadError, match=message) as caught:
        pipe.load_lora_weights(source if kind == "given" else file)
    assert (str(file) if kind != "given" else "the given tensors") in str(caught.value)
    unchanged(pipe, before)


def unchanged(pipe, before):
    assert pipe.get_active_adapters() == ["there"]
    for name, model in models(pipe).items():
        old, new = dict(before[name].named_parameters()), dict(model.named_parameters())
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
        assert [type(one) for one in model.modules()] == [type(one) for one in before[name].modules()]


def test_a_rank_of_a_thousand_million(sd, tmp_path):
    """In a pickle it takes a few bytes: one number, seen a thousand million times."""
    huge = changed(**{A: torch.ones(1).expand(10**9, 4, 3, 3), B: torch.ones(1).expand(32, 10**9, 1, 1)})
    refused(sd[0], lambda: huge(write(sd[0], "peft", 4)), "bin", r"A of \(1000000000, 4, 3, 3\)", tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("code of a file has run",)


def test_damaged_files(sd, tmp_path, capsys):
    load(sd[:1], write(sd[0], "peft", 2, seed=9), adapter_name="there")
    before = copy.deepcopy(models(sd[0]))
    headers = ("[1", "[[1, 2]]", '{"unet.alpha_pattern": ["to_q"]}')
    files = {name: tmp_path / name for name in ("cut.safetensors", "cut.bin", "evil.bin", *"012")}
    file = write(sd[0], "peft", 4)
    save_file(file, files["cut.safetensors"])
    torch.save(file, files["cut.bin"])
    cut(files["cut.safetensors"]), cut(files["cut.bin"])
    torch.save(file | {"unet.x": Evil()}, files["evil.bin"])
    for number, header in zip("012", headers, strict=True):
        files[number] = tmp_path / f"header{number}.safetensors"
        save_file(file, files[number], metadata={"lora_adapter_metadata": header})
    for path in files.values():
        with pytest.raises(LoadError, match=re.escape(str(path))):
            sd[0].load_lora_weights(path)
        unchanged(sd[0], before)
    assert "code of a file" not in capsys.readouterr().out
    with pytest.raises(LoadError, match="give weight_name; it has"):
        sd[0].load_lora_weights(tmp_path)
    with pytest.raises(LoadError, match="has no other"):
        sd[0].load_lora_weights(tmp_path, weight_name="other.safetensors")
    with pytest.raises(LoadError, match="use_safetensors=True"):
        sd[0].load_lora_weights(files["cut.bin"], use_safetensors=True)
    (tmp_path / "one").mkdir()
    save_file(file, tmp_path / "one" / "x.safetensors")
    with pytest.raises(LoadError, match="not one file to read"):
        sd[0].load_lora_weights(tmp_path / "one", use_safetensors=False)
    with pytest.raises(LoadError, match="there is no such folder"):
        sd[0].load_lora_weights(tmp_path / "nowhere")


def test_arguments_that_do_not_fit(sd, tmp_path):
    pipe, file = sd[0], write(sd[0], "peft", 2)
    load([pipe], file, adapter_name="one")
    for call, message in (
        (lambda: pipe.load_lora_weights(file, adapter_name="one"), "adapter_name='one' is in use"),
        (lambda: pipe.load_lora_weights(file, adapter_name="a.b"), "without a dot"),
        (lambda: pipe.load_lora_weights(file, adapter_name="keys"), "adapter_name='keys' can't"),
        (lambda: pipe.load_lora_weights(file, hotswap=True), "hotswap"),
        (lambda: pipe.set_adapters("two"), "adapter_names has two; loaded: one"),
        (lambda: pipe.set_adapters(["one"], [1.0, 2.0]), "adapter_weights has 2 for 1"),
        (lambda: pipe.set_adapters("one", float("nan")), "adapter_weights=nan"),
        (lambda: pipe.delete_adapters("two"), "adapter_names has two; loaded: one"),
        (lambda: pipe.fuse_lora(components=["vae"]), "components has vae"),
        (lambda: pipe.fuse_lora(adapter_names=["two"]), "adapter_names has two; loaded: one"),
        (lambda: pipe(PROMPT, cross_attention_kwargs={"gligen": 1}), "cross_attention_kwargs=.*gligen.* may hold LoRA"),
        (lambda: pipe(PROMPT, cross_attention_kwargs={"scale": float("inf")}), "scale"),
        (lambda: pipe(PROMPT, cross_attention_kwargs=0.5), "cross_attention_kwargs=0.5 may hold LoRA"),
        (lambda: pipe.encode_prompt(PROMPT, lora_scale="1"), "lora_scale must be a number"),
        (lambda: pipe.save_lora_weights(tmp_path), "unet_lora_layers, text_encoder"),
        (lambda: pipe.save_lora_weights(None, pipe.unet), "save_directory must be a folder, not NoneType"),
        (lambda: pipe.save_lora_weights(tmp_path, [*pipe.unet.parameters()]), "unet_lora_layers, .* must be a dict"),
        (lambda: pipe.save_lora_weights(tmp_path, torch.nn.Linear(2, 2)), "pipe.unet, not for a Linear"),
        (lambda: pipe.save_lora_weights(tmp_path, {5: torch.ones(1)}), "unet_lora_layers, .*; 5 is none"),
        (lambda: pipe.save_lora_weights(tmp_path, pipe.unet, weight_name="a/b.safetensors"), "weight_name='a/b"),
        (lambda: pipe.save_lora_weights(tmp_path, pipe.unet, weight_name="a.bin"), "weight_name='a.bin'"),
        (lambda: pipe.save_lora_weights(tmp_path, pipe.unet, unet_lora_adapter_metadata=4), "metadata must be"),
        (lambda: pipe.save_lora_weights(tmp_path, pipe.unet, unet_lora_adapter_metadata={"r": 1j}), "no JSON"),
        (lambda: pipe.save_lora_weights(tmp_path, pipe.unet, safe_serialization=False), "safe_serialization"),
        (lambda: lora.add(pipe.unet, rank=0), "rank=0"),
        (lambda: lora.add(pipe.unet, targets="nothing"), "targets: .*nothing"),
        (lambda: lora.add(pipe.unet, adapter_name="one"), "adapter_name='one' is in use"),
        (lambda: lora.state_dict(pipe.unet, "two"), "adapter_name='two' is none of the network's: one"),
        (lambda: lora.add(torch.nn.Linear(2, 2)), "pipe.unet, not for a Linear"),
        (lambda: lora.add(pipe.unet, 2, None), "targets must be a name or a list of names, not None"),
        (lambda: lora.add(pipe.unet, 2.5), "rank must be an integer"),
        (lambda: pipe.set_adapters(None), "adapter_names must be a name or a list"),
        (lambda: pipe.delete_adapters([None]), "adapter_names must be a name or a list"),
        (lambda: pipe.fuse_lora(components=5), "components must be a name or a list"),
        (lambda: pipe.fuse_lora(adapter_names=5), "adapter_names must be a name or a list"),
        (lambda: pipe.unet.load_state_dict({5: torch.ones(1)}), "state_dict must be a dictionary .*; 5 is"),
        (lambda: pipe.unet.load_state_dict(None), "state_dict must be a dictionary"),
        (lambda: pipe.load_lora_weights(tmp_path, weight_name=5), "weight_name must be a path inside"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert not [*tmp_path.iterdir()]
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="can't be loaded while one is fused"):
        pipe.unet.load_state_dict(pipe.unet.state_dict())


def test_a_scale_without_lora_is_a_warning(sd):
    with pytest.warns(UserWarning, match="cross_attention_kwargs has no effect: no LoRA is active"):
        scaled(sd[0], 0.5)


def test_saved_files_are_the_references(sd, tmp_path):
    """The same tensors and the same header from the same call."""
    layers = {key.removeprefix("unet."): value for key, value in write(sd[0], "peft", 2, chosen=attention).items()}
    layers = {key: value for key, value in layers.items() if "attn" in key and "text" not in key}
    says = {"unet_lora_adapter_metadata": {"r": 2, "lora_alpha": 4, "target_modules": {"to_q"}}}
    for name, pipe in zip(("ours", "theirs"), sd, strict=True):
        pipe.save_lora_weights(tmp_path / name, unet_lora_layers=layers, **copy.deepcopy(says))
    files = [tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("ours", "theirs")]
    ours, theirs = map(load_file, files)
    assert read_header(files[0]) == read_header(files[1])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for pipe in sd:
        pipe.load_lora_weights(tmp_path / "ours")
    compare(sd)
    one = torch.ones(2, 2)
    sd[0].save_lora_weights(tmp_path, {"a": one, "b": one, "c": one.t()})  # which a file can't hold as one
    assert all(tensor.equal(one) for tensor in load_file(tmp_path / files[0].name).values())


PLACES = {  # what to give, and the rank of the file that both read then
    "whole": ({}, 1),
    "pickles alone": ({"use_safetensors": False}, 2),
    "with a slash": ({"subfolder": "sub/", "weight_name": "other.safetensors"}, 3),
    "from here": ({"subfolder": "./sub", "weight_name": "other.safetensors"}, 3),
    "a name with folders": ({"weight_name": "sub/other.safetensors"}, 3),
    "both": ({"subfolder": "sub", "weight_name": "deep/other.safetensors"}, 4),
}


@pytest.fixture(scope="module")
def places(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    usual = [f"pytorch_lora_weights.{end}" for end in ("safetensors", "bin")]
    for rank, name in enumerate((*usual, "sub/other.safetensors", "sub/deep/other.safetensors"), 1):
        (file := folder / name).parent.mkdir(exist_ok=True)
        tensors = write(sd[0], "peft", rank, chosen=lambda hub: hub.endswith("attn1.to_q"))
        torch.save(tensors, file) if file.suffix == ".bin" else save_file(tensors, file)
    return folder


@pytest.mark.parametrize("case", PLACES)
def test_where_a_file_is(sd, places, case):
    options, rank = PLACES[case]
    for pipe in sd:
        pipe.load_lora_weights(places, **options)
    ours = {len(one.A) for layer in lora.adapted(sd[0].unet) for one in layer.adapters.values()}
    assert ours == {config.r for config in sd[1].unet.peft_config.values()} == {rank}


def test_a_place_beside_a_file_is_a_warning(sd, places):
    for source in (places / "sub" / "other.safetensors", write(sd[0], "peft", 1)):
        with pytest.warns(UserWarning, match="subfolder has no effect beside a file or tensors") as caught:
            sd[0].load_lora_weights(source, weight_name="x.safetensors", subfolder="y")
        assert caught[0].filename == __file__
