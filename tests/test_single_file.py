"""Files that hold a whole system under its authors' names, beside the reference's `from_single_file`."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import diffusers
import huggingface_hub
import numpy as np
import originals
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from fake_hub import REPOSITORY, FakeHub
from PIL import Image
from reference import difference, randomize
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import LoadError
from minidiff.__main__ import main
from minidiff.loading.component import REGISTRY
from minidiff.loading.tensors import to_ours
from minidiff.loading.weights import fit
from weights_compat import TABLES
from weights_compat.manifests import narrow, read_manifest
from weights_compat.random_folder import make_random_folder
from weights_compat.single_file import original
from weights_compat.standard import UNETS, WAY_DOWN, standard_files, standard_model

FAMILIES = sorted(UNETS.values())
CONTROL = {"addition_embed_type": None}  # a default
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
PROMPT = "a red apple"


def picture(side, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def arguments(pipe):
    """What a call of a pipeline takes, small."""
    made = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "np"}
    side = pipe.unet.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if "Inpaint" in type(pipe).__name__:
        made |= {"image": picture(side), "mask_image": picture(side, 1).convert("L"), "height": side, "width": side}
    elif "Upscale" in type(pipe).__name__:
        made |= {"image": picture(16)}
    elif "Pix2Pix" in type(pipe).__name__:
        made |= {"image": picture(side)}
    elif "Img2Img" in type(pipe).__name__:
        made |= {"image": picture(side), "strength": 0.9}
    return made | {"generator": torch.Generator().manual_seed(3)}


class Family:
    """A narrow folder of a standard model with random weights, and the file that its authors would publish."""

    def __init__(self, name, place):
        self.name, self.folder, self.file = name, place / "folder", place / "file.safetensors"
        manifest = read_manifest(name)
        manifest.files.pop("safety_checker/config.json", None)
        manifest.tensors.pop("safety_checker", None)
        manifest = narrow(manifest)
        make_random_folder(manifest, self.folder)
        originals.write(self.folder, self.file)
        self.class_name = manifest.index["_class_name"]
        self.cls = getattr(minidiff, self.class_name)
        self.without = {"feature_extractor": None} if "feature_extractor" in manifest.index else {}

    def ours(self, file=None, **options):
        pipe = self.cls.from_single_file(file or self.file, config=self.folder, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def reference(self, file=None, **options):
        cls = getattr(diffusers, self.class_name)
        options = {"torch_dtype": torch.float32} | options  # without, XL's encoders are in what their configs say
        pipe = cls.from_single_file(str(file or self.file), config=str(self.folder), **self.without, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe


made = {}


@pytest.fixture
def family(request, tmp_path_factory):
    name = request.param
    if name not in made:
        made[name] = Family(name, tmp_path_factory.mktemp(name))
    return made[name]


@pytest.fixture
def sd(tmp_path_factory):
    if "sd" not in made:
        made["sd"] = Family("stable-diffusion-v1-5", tmp_path_factory.mktemp("sd"))
    return made["sd"]


def equal(pipe, reference):
    """All tensors of all networks, bit for bit."""
    for name in NETWORKS:
        if getattr(reference, name, None) is None:
            assert pipe.components.get(name) is None
            continue
        model = getattr(pipe, name)
        ours = {model.table.hub(key): tensor for key, tensor in model.state_dict().items()}
        theirs = dict(getattr(reference, name).state_dict())
        if name == "text_encoder":  # transformers 5 left out a prefix
            theirs = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in theirs.items()}
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[key]) and tensor.dtype == theirs[key].dtype for key, tensor in ours.items())


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_tensors_pictures_and_the_way_back_are_the_references(family, tmp_path):
    pipe, reference = family.ours(), family.reference()
    equal(pipe, reference)
    assert type(pipe.scheduler).__name__ == type(reference.scheduler).__name__
    assert dict(pipe.scheduler.config).items() >= {("prediction_type", reference.scheduler.config.prediction_type)}
    ours, theirs = (torch.from_numpy(one(**arguments(one)).images) for one in (pipe, reference))
    assert difference(ours, theirs) <= 1e-4
    pipe.save_single_file(tmp_path / "back.safetensors")
    equal(pipe, family.reference(tmp_path / "back.safetensors"))
    published, written = load_file(family.file), load_file(tmp_path / "back.safetensors")
    assert all(tensor.equal(published[name]) for name, tensor in written.items())
    assert os.listdir(tmp_path) == ["back.safetensors"]


@cache
def full_size(name):
    """The networks of a standard model on the meta device: ours, and all tensors under the Hub's names."""
    files = standard_files(name)
    kinds = {part: REGISTRY[files["model_index.json"][part][1]] for part in NETWORKS if f"{part}/config.json" in files}
    with torch.device("meta"):
        models = {part: kind(kind.Config.read(files[f"{part}/config.json"])) for part, kind in kinds.items()}
    tensors = {
        part: {model.table.hub(key): value for key, value in model.state_dict().items()}
        for part, model in models.items()
    }
    return models, tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_one_to_one_at_full_size(name):
    """Against the tests' own table; and every name leads back to where it came from."""
    models, tensors = full_size(name)
    published, written = originals.original(tensors), {}
    for model in models.values():
        layout = original(model.part, model.config, [other.part for other in models.values()])
        for key, tensor in model.state_dict().items():
            there, change = layout.table.origin(key)
            assert (key, change) in layout.table.places(there)
            written.setdefault(layout.prefixes[0] + there, []).append(tensor.shape)
    assert written.keys() <= published.keys()
    for name in published.keys() - written.keys():  # SD 2's last layer, and constants
        assert re.search(r"resblocks\.23\.|text_projection|logit_scale|^[a-z0-9_]+$", name)
    assert sum(len(shapes) for shapes in written.values()) == sum(len(m.state_dict()) for m in models.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_references_map_is_the_same_at_full_size(name):
    """Its functions pass most tensors on as they are: so where each one goes can be seen without any weights."""
    models, tensors = full_size(name)
    published = originals.original(tensors)
    for part, convert in (("unet", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)):
        config, table = models[part].config, models[part].table
        layout = original(part, config, [*models])
        moved = convert(dict(published), dict(config))
        assert moved.keys() == tensors[part].keys()
        for hub, tensor in moved.items():
            there, change = layout.table.origin(table.ours(hub))
            source = published[layout.prefixes[0] + there]
            assert tensor is source if change == "same" else tensor.shape == to_ours(change, source).shape


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-2-1", "stable-diffusion-xl-base-1.0"])
def test_a_controlnets_names_are_one_to_one(name):
    """The reference's network, of the config that comes with the package."""
    config = standard_files(name)["controlnet/config.json"]
    with torch.device("meta"):
        tensors = diffusers.ControlNetModel.from_config(config).state_dict()
    layout = original("controlnet", {"conditioning_embedding_out_channels": (16, 32, 96, 256), **CONTROL, **config}, [])
    own = {
        "controlnet_cond_embedding": "control",
        "controlnet_down_blocks": "out_down",
        "controlnet_mid_block": "out_mid",
    }
    pattern = f"^({'|'.join(own)})"
    ours = {
        key: TABLES["UNet2DConditionModel"].ours(key) or re.sub(pattern, lambda m: own[m[1]], key) for key in tensors
    }
    written = [layout.table.origin(key)[0] for key in ours.values()]
    assert dict(zip(written, tensors, strict=True)).keys() == originals.controlnet(tensors).keys()
    assert [layout.table.ours(there) for there in written] == list(ours.values())


def test_a_controlnet_alone(sd, tmp_path):
    """Its tensors are the reference's, there and back; a UNet's file isn't one, nor one a UNet's."""
    small = {key: value for key, value in sd.ours().unet.config.items() if key in WAY_DOWN}
    net = diffusers.ControlNetModel.from_config(small | {"norm_num_groups": 8})
    randomize(net, 0).save_pretrained(tmp_path / "controlnet")
    tensors = {f"control_model.{key}": value for key, value in originals.controlnet(net.state_dict()).items()}
    save_file(tensors, file := tmp_path / "x.safetensors")
    ours = minidiff.ControlNetModel.from_single_file(file, config=tmp_path)
    expected = net.state_dict()
    assert all(tensor.equal(expected[ours.table.hub(key)]) for key, tensor in ours.state_dict().items())
    ours.save_single_file(tmp_path / "back.safetensors")
    options = {"config": str(tmp_path), "subfolder": "controlnet"}
    back = diffusers.ControlNetModel.from_single_file(str(tmp_path / "back.safetensors"), **options).state_dict()
    assert back.keys() == expected.keys() and all(back[key].equal(expected[key]) for key in expected)
    with pytest.raises(LoadError, match="is none of the standard models"):
        minidiff.ControlNetModel.from_single_file(file)
    with pytest.raises(LoadError, match="looks like a ControlNet"):
        minidiff.UNet2DConditionModel.from_single_file(file, config=sd.folder)
    with pytest.raises(LoadError, match="has no place in ControlNetModel"):
        minidiff.ControlNetModel.from_single_file(sd.file, config=tmp_path)


MEASURE = """
import re, sys, warnings, minidiff, torch
warnings.simplefilter("ignore")
def anonymous():
    return int(re.search(r"Anonymous: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1])
minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-emoji"))
before = anonymous()
pipe = minidiff.DiffusionPipeline.from_single_file(sys.argv[1])
for model in pipe._models():
    next(model.parameters()).sum()
print(type(pipe).__name__, sum(p.numel() for m in pipe._models() for p in m.parameters()), anonymous() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"])
def test_a_full_size_file_is_known_by_its_shapes_and_stays_mapped(name, tmp_path):
    models, tensors = full_size(name)
    file = originals.write_sparse(tmp_path / "x.safetensors", originals.original(tensors))
    run = [sys.executable, "-c", MEASURE, str(file)]
    out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    class_name, count, anonymous = out.split()
    assert class_name == standard_files(name)["model_index.json"]["_class_name"]
    assert int(count) == sum(tensor.numel() for model in models.values() for tensor in model.parameters())
    assert int(anonymous) < 64 * 1024  # kB, of 4 and 14 GB


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_tell_the_standard_model(name):
    _, tensors = full_size(name)
    shapes = {key: tensor.shape for key, tensor in originals.original(tensors).items()}
    assert standard_model(shapes) == (name, "unet")
    for part in ("unet", "vae"):  # alone in a file, with either's names
        for named in (tensors[part], getattr(originals, part)(tensors[part])):
            found = standard_model({key: tensor.shape for key, tensor in named.items()})
            upscaler = "stable-diffusion-x4-upscaler"
            same = name if part == "unet" or name == upscaler else "stable-diffusion-v1-5"
            assert found == (same, part)


def test_a_file_alone_has_all_that_a_pipeline_needs(tmp_path, monkeypatch):
    """No folder, no Hub, no cache: configs, scheduler and tokenizers come with the package."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    _, tensors = full_size("stable-diffusion-2-1")
    file = originals.write_sparse(tmp_path / "x.safetensors", originals.original(tensors))
    with pytest.warns(UserWarning, match='predicts v or noise.*config="stabilityai/stable-diffusion-2-1-base"'):
        pipe = minidiff.DiffusionPipeline.from_single_file(file)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer(PROMPT).input_ids == [49406, 320, 736, 3055, 49407]
    pipe = minidiff.DiffusionPipeline.from_single_file(file, config="stabilityai/stable-diffusion-2-1-base")
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_pickles_halves_and_averages(sd, tmp_path):
    halves = originals.write(sd.folder, tmp_path / "x.ckpt", torch.float16)
    equal(sd.ours(halves, torch_dtype=torch.float16), sd.reference(halves, torch_dtype=torch.float16))
    equal(sd.ours(halves), sd.reference(halves))  # float32
    assert sd.ours(halves, dtype="auto").dtype == torch.float16
    tensors = load_file(sd.file)
    means = {
        f"model_ema.{''.join(name.split('.')[1:])}": tensor * 2
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(tensors | means | {"model_ema.decay": torch.ones(1)}, tmp_path / "ema.safetensors")
    averaged = sd.ours(tmp_path / "ema.safetensors", extract_ema=True)
    equal(averaged, sd.reference(tmp_path / "ema.safetensors", extract_ema=True))
    with pytest.warns(UserWarning, match=r"averaged weights of the UNet too: extract_ema=True"):
        plain = sd.ours(tmp_path / "ema.safetensors")
    assert averaged.unet.conv_in.weight.equal(2 * plain.unet.conv_in.weight)
    with pytest.raises(LoadError, match=r"extract_ema=True, but it has no averaged weights"):
        sd.ours(extract_ema=True)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_networks_alone(sd, part, tmp_path):
    name = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[part]
    ours, theirs = getattr(minidiff, name), getattr(diffusers, name)
    hub = load_file(next((sd.folder / part).glob("*.safetensors")))
    bare = getattr(originals, part)(hub)
    save_file({key: tensor.contiguous() for key, tensor in bare.items()}, tmp_path / "bare.safetensors")
    save_file(hub, tmp_path / "hub.safetensors")
    expected = ours.from_pretrained(sd.folder, subfolder=part).state_dict()
    reference = theirs.from_single_file(str(sd.file), config=str(sd.folder), subfolder=part).state_dict()
    assert all(tensor.equal(reference[ours.table.hub(key)]) for key, tensor in expected.items())
    for source in (sd.file, tmp_path / "bare.safetensors", tmp_path / "hub.safetensors", bare, load_file(sd.file)):
        for config in ({"config": sd.folder}, {"config": sd.folder / part}, {"config": sd.folder, "subfolder": part}):
            model = ours.from_single_file(source, **config)
            assert not model.training
            assert all(tensor.equal(expected[key]) for key, tensor in model.state_dict().items())
    model.save_single_file(tmp_path / "back.safetensors")
    back = theirs.from_single_file(str(tmp_path / "back.safetensors"), config=str(sd.folder), subfolder=part)
    assert all(tensor.equal(reference[key]) for key, tensor in back.state_dict().items())
    assert load_file(tmp_path / "back.safetensors").keys() == {
        key if part == "vae" else f"model.diffusion_model.{key}" for key in bare
    }


def test_the_vae_file_that_training_left(sd, tmp_path):
    """With the discriminator, and EMA's counters; of full size, so that its config is known."""
    _, tensors = full_size("stable-diffusion-v1-5")
    vae = originals.vae(tensors["vae"]) | {
        "loss.discriminator.main.0.weight": torch.ones(3),
        "model_ema.x": torch.ones(1),
    }
    file = originals.write_sparse(tmp_path / "vae.safetensors", vae)
    with pytest.warns(UserWarning, match="1, 2 or XL, the file doesn't say which"):
        assert minidiff.AutoencoderKL.from_single_file(file).config.scaling_factor == 0.18215
    model = minidiff.AutoencoderKL.from_single_file(file, scaling_factor=0.13025, torch_dtype=torch.bfloat16)
    assert (model.config.scaling_factor, model.dtype) == (0.13025, torch.bfloat16)


def test_given_parts_are_taken_and_not_read(sd, tmp_path):
    tensors = {key: value for key, value in load_file(sd.file).items() if not key.startswith("cond_stage_model.")}
    save_file(tensors, tmp_path / "pruned.safetensors")
    configs = shutil.copytree(sd.folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(LoadError, match=r"holds no text_encoder: give it, from_single_file\(\.\.\., text_encoder="):
        sd.cls.from_single_file(tmp_path / "pruned.safetensors", config=configs)
    encoder = minidiff.CLIPTextModel.from_pretrained(sd.folder, subfolder="text_encoder")
    scheduler = minidiff.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = sd.ours(tmp_path / "pruned.safetensors", text_encoder=encoder, scheduler=scheduler)
    assert pipe.text_encoder is encoder and pipe.scheduler is scheduler
    assert sd.ours(tmp_path / "pruned.safetensors").text_encoder is not None  # the folder has its weights
    assert pipe.safety_checker is None


def test_tensors_of_nobody_are_told(sd, tmp_path):
    save_file(load_file(sd.file) | {"control_model.x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match=r"nobody's, and left out: control_model\.x, y"):
        sd.ours(tmp_path / "x.safetensors")


# Faults

UNET = "model.diffusion_model."
STRANGERS = {
    "Stable Diffusion 3": f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias",
    "Flux": "double_blocks.0.img_attn.norm.key_norm.scale",
    "a diffusion transformer": "blocks.0.head.modulation",
    "a LoRA": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "a LoRA,": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "a textual inversion": "emb_params",
    "a textual inversion,": "<cat-toy>",
    "a ControlNet: ControlNetModel.from_single_file": "control_model.input_hint_block.0.weight",
    "a video model": f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight",
    "a video model, or": "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",
    "one part of a folder: from_pretrained": "down_blocks.0.resnets.0.norm1.weight",
    "one part of a folder": "text_model.embeddings.position_embedding.weight",
}


@pytest.mark.parametrize(("what", "name"), STRANGERS.items())
def test_what_a_file_looks_like_is_said(what, name, sd, tmp_path):
    save_file({name: torch.ones(2, 2), "another": torch.ones(2)}, file := tmp_path / "x.safetensors")
    what = re.escape(what.removesuffix(",").removesuffix(", or"))
    for load in (minidiff.StableDiffusionPipeline, minidiff.DiffusionPipeline, minidiff.AutoencoderKL):
        with pytest.raises(LoadError, match=rf"x\.safetensors: looks like {what}"):
            load.from_single_file(file)
    for load in (sd.ours, lambda file: minidiff.AutoencoderKL.from_single_file(file, config=sd.folder)):
        with pytest.raises(LoadError, match=rf"x\.safetensors: looks like {what}"):
            load(file)


def test_an_embedding_of_2022_and_a_network_of_another_kind(sd, tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="'string_to_token' is dict, not a tensor; looks like a textual inversion"):
        sd.ours(tmp_path / "x.pt")
    unet = originals.unet(load_file(next((sd.folder / "unet").glob("*.safetensors"))))
    control = {name: tensor for name, tensor in unet.items() if not name.startswith("out")}
    with pytest.raises(LoadError, match="looks like a ControlNet"):
        extra = {"input_hint_block.0.weight": torch.ones(3)}
        minidiff.UNet2DConditionModel.from_single_file(control | extra, config=sd.folder)
    with pytest.raises(TypeError, match="_or_dict must be a dictionary of tensors by name; 5 is none, nor a name"):
        minidiff.UNet2DConditionModel.from_single_file(control | {5: torch.ones(3)}, config=sd.folder)
    with pytest.raises(LoadError, match=r"input_blocks\.0\.0\.weight has no place in AutoencoderKL"):
        minidiff.AutoencoderKL.from_single_file(unet, config=sd.folder)
    with pytest.raises(LoadError, match=r"dictionary: \d+ tensors are missing, the first is output_blocks\.0\.0\."):
        minidiff.UNet2DConditionModel.from_single_file(control, config=sd.folder)


def test_another_systems_pipeline_and_config(sd, tmp_path):
    save_file({"edm_mean": torch.ones(4)}, tmp_path / "playground.safetensors")  # beside networks of XL's shapes
    with pytest.raises(LoadError, match=r"looks like Playground 2\.5: give config="):
        minidiff.StableDiffusionXLPipeline.from_single_file(tmp_path / "playground.safetensors")
    with pytest.raises(LoadError, match="goes with StableDiffusionPipeline, not with StableDiffusionXLPipeline"):
        minidiff.StableDiffusionXLPipeline.from_single_file(sd.file, config=sd.folder)
    with pytest.raises(LoadError, match="is none of the standard models: give config="):
        minidiff.StableDiffusionPipeline.from_single_file(sd.file)
    message = r"file\.safetensors: the tensor first_stage_model\.\S+ has shape .*config\.json makes it"
    with pytest.raises(LoadError, match=message):
        minidiff.AutoencoderKL.from_single_file(sd.file, config="stabilityai/stable-diffusion-2-1")
    with pytest.raises(LoadError, match="no such folder, and it is no Hub id"):
        sd.cls.from_single_file(sd.file, config="./nowhere/at/all")


def damaged(tensors, fault):
    first = f"{UNET}input_blocks.0.0.weight"
    if fault == "shape":
        return tensors | {first: torch.ones(3)}
    if fault == "scalar":
        return tensors | {"first_stage_model.encoder.mid.attn_1.q.weight": torch.tensor(1.0)}
    if fault == "missing":
        return {name: tensor for name, tensor in tensors.items() if name != first}
    if fault == "unknown":
        return tensors | {f"{UNET}input_blocks.99.0.weight": torch.ones(3)}
    return tensors | {first: tensors[first].to(torch.int8)}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("shape", r"input_blocks\.0\.0\.weight has shape \(3,\); config\.json makes it \(32, 4, 3, 3\)"),
        ("scalar", r"attn_1\.q\.weight has shape \(\); config\.json makes it"),
        ("missing", r"1 tensors are missing, the first is model\.diffusion_model\.input_blocks\.0\.0\.weight"),
        ("unknown", r"input_blocks\.99\.0\.weight has no place in UNet2DConditionModel"),
        ("integers", r"input_blocks\.0\.0\.weight is torch\.int8, not a floating-point type"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_wrong_tensors(sd, fault, message, suffix, tmp_path):
    tensors, file = damaged(load_file(sd.file), fault), tmp_path / f"x.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    with pytest.raises(LoadError, match=rf"x\.{suffix}: .*{message}"):
        sd.ours(file)
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("fault", ["shape", "scalar"])
def test_wrong_tensors_that_are_split_or_turned(fault, tmp_path):
    bad = torch.tensor(1.0) if fault == "scalar" else torch.ones(2, 3, 4)
    encoder = minidiff.CLIPTextModelWithProjection.Config.read({"hidden_act": "gelu"})
    layout = original("text_encoder_2", encoder, ["text_encoder", "text_encoder_2"])
    for name in ("transformer.resblocks.0.attn.in_proj_weight", "text_projection"):
        shapes = {place: torch.Size((7, 7)) for place, _ in layout.table.places(name)}
        with pytest.raises(LoadError, match=f"the tensor {name} has shape"):
            fit([("x", name, bad)], None, layout.table, shapes, "CLIP", "x")


class Code:
    def __reduce__(self):
        return os.mkdir, ("made by code in the file",)


@pytest.mark.parametrize("fault", ["cut", "code", "empty", "text", "wrapped for ever", "a list"])
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_damaged_and_hostile_files(sd, fault, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = originals.write(sd.folder, tmp_path / f"x.{suffix}")
    endless = {}
    endless["state_dict"] = endless
    contents = {"code": {"state_dict": {"x": Code()}}, "wrapped for ever": endless, "a list": [torch.ones(1)]}
    if fault in contents:
        torch.save(contents[fault], file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>not found</html>"}[fault])
    with pytest.raises(LoadError, match=rf"x\.{suffix}: "):
        sd.ours(file)
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"original_config": "v1-inference.yaml"}, ValueError, "original_config=.* is not supported: give config="),
        ({"prediction_type": "epsilon"}, ValueError, "prediction_type=.*: give scheduler="),
        ({"load_safety_checker": True}, ValueError, "load_safety_checker=True .*give safety_checker="),
        ({"scaling": 1}, TypeError, "StableDiffusionPipeline has no scaling; it takes"),
        ({"torch_dtype": "float16"}, TypeError, "dtype must be a floating-point"),
        ({"config": 5}, TypeError, "config must be a folder or a Hub id, not int"),
        ({"vae": 5}, TypeError, "vae must be"),
        ({"vae": None}, ValueError, "None was given for vae, which StableDiffusionPipeline needs"),
    ],
)
def test_wrong_arguments(sd, options, error, message):
    with pytest.raises(error, match=message):
        sd.cls.from_single_file(sd.file, **{"config": sd.folder} | options)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("nowhere.safetensors", r"nowhere\.safetensors: no file, and no address of one\. On the Hub it is such as"),
        ("https://civitai.com/api/download/models/1", "no address of one"),
        ("https://huggingface.co/org/name", "no address of one"),
        (Path(__file__).parent, "a folder: from_pretrained reads it"),
        ("", "pretrained_model_link_or_path is empty"),
        ("a\0b", "null character"),
    ],
)
def test_no_file(link, message):
    for cls in (minidiff.StableDiffusionPipeline, minidiff.AutoencoderKL):
        with pytest.raises(LoadError, match=message):
            cls.from_single_file(link)
    with pytest.raises(TypeError, match="pretrained_model_link_or_path must be a file or its address on the Hub"):
        minidiff.StableDiffusionPipeline.from_single_file(None)


def test_from_the_hub(sd, tmp_path, monkeypatch):
    shutil.copytree(sd.folder, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "hub" / "v1.safetensors").write_bytes(sd.file.read_bytes())
    with FakeHub(tmp_path / "hub") as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        link, cache = f"{server.url}/{REPOSITORY}/blob/main/v1.safetensors", {"cache_dir": tmp_path / "cache"}
        pipe = sd.cls.from_single_file(link, config=REPOSITORY, **cache)
        assert "v1.safetensors" in server.downloaded and "unet/config.json" in server.downloaded
        server.downloaded.clear()
        again = sd.cls.from_single_file(link, config=REPOSITORY, **cache, local_files_only=True)
        assert not server.downloaded
        with pytest.raises(LoadError, match=r"v2\.safetensors: not to be had from the Hub"):
            sd.cls.from_single_file(link.replace("v1", "v2"), config=REPOSITORY, **cache)
    for one in (pipe, again):
        assert one.unet.conv_in.weight.equal(sd.ours().unet.conv_in.weight)


# Saving


def test_a_save_is_whole_or_not_at_all(sd, tmp_path, monkeypatch):
    file, pipe = tmp_path / "x.safetensors", sd.ours()
    file.write_bytes(b"as it was")
    with monkeypatch.context() as patch:
        patch.setattr("minidiff.loading.single_file.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            pipe.save_single_file(file)
    assert file.read_bytes() == b"as it was" and os.listdir(tmp_path) == [file.name]
    pipe.save_single_file(file)
    equal(sd.ours(file), sd.reference(file))
    sd.ours(file).save_single_file(file)  # onto the file that its weights are mapped from
    equal(sd.ours(file), sd.reference(file))


def test_what_cant_be_saved(sd, tmp_path):
    pipe = sd.ours()
    for path in ("x.ckpt", "nowhere/x.safetensors"):
        with pytest.raises(ValueError, match=r"must be a \.safetensors file in a folder that exists"):
            pipe.save_single_file(tmp_path / path)
    file = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="unet is a UNet2DModel, which original files don't hold"):
        minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled("tiny-ddpm")).save_single_file(file)
    lcm = minidiff.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match=r"the tensor time_mlp\.cond\.weight has no name in such a file"):
        lcm.save_single_file(file)
    pipe.unet.conv_in = torch.nn.Conv2d(4, 8, 3)
    with pytest.raises(ValueError, match="of this UNet2DConditionModel has shape"):
        pipe.save_single_file(file)
    assert not file.exists()


def test_saved_halves_stay_halves_and_the_safety_checker_stays_out(sd, tmp_path):
    pipe = sd.ours(torch_dtype=torch.float16)
    pipe.vae.to(torch.float32)
    pipe.save_single_file(tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("first_stage")} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if not name.startswith("first_stage")} == {torch.float16}


def test_the_bundled_model_goes_there_and_back(tmp_path, capsys):
    """Its text encoder is CLIP's, at the size of a toy; and the command line takes the file."""
    folder = minidiff.bundled("tiny-emoji")
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    pipe.save_single_file(file := tmp_path / "x.safetensors")
    again = minidiff.StableDiffusionPipeline.from_single_file(file, config=folder)
    for name in NETWORKS[:3]:
        ours, theirs = (getattr(one, name).state_dict() for one in (again, pipe))
        assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())
    out = str(tmp_path / "x.png")
    assert main(["a cat", "--model", str(file), "--device", "cpu", "-o", out]) == 1
    assert "x.safetensors: is none of the standard models" in capsys.readouterr().err
