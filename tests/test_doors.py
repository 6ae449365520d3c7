"""The doors under the names that documentation imports, pushing to the Hub, and the names that aren't here."""

import http.server
import importlib
import logging as python_logging
import random
import socket
import sys
import threading
import warnings
from pathlib import Path

import diffusers
import diffusers.optimization
import diffusers.training_utils
import diffusers.utils
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from reference import narrow_config, twins

import minidiff as m
from minidiff import optimization, training_utils, utils
from minidiff.training_utils import EMAModel
from minidiff.utils import logging


def picture(mode="RGB", size=(9, 7), seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


# Pictures


@pytest.fixture
def server(tmp_path):
    """A web server of a folder: its address, and the folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_load_image_from_everywhere(mode, server):
    url, folder = server
    image, name = picture(mode), "a.tif" if mode == "CMYK" else "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(folder / name, exif=image.getexif() if mode == "CMYK" else exif)
    reference = diffusers.utils.load_image(str(folder / name))
    assert reference.size == ((9, 7) if mode == "CMYK" else (7, 9))
    for source in (folder / name, str(folder / name), f"{url}/{name}", Image.open(folder / name)):
        loaded = utils.load_image(source)
        assert (loaded.mode, loaded.tobytes()) == ("RGB", reference.tobytes())
    gray = utils.load_image(folder / name, convert_method=lambda image: image.convert("L"))
    assert gray.mode == "L"


def test_load_image_says_what_is_wrong(server, tmp_path):
    url, folder = server
    picture().save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:80])
    (folder / "text.png").write_text("no picture")
    for source, kind, message in [
        ("nowhere.png", ValueError, "nowhere.png.*no file here.*http"),
        ("ftp://a/b.png", ValueError, "no file here"),
        (torch.zeros(3, 8, 8), ValueError, "not Tensor"),
        (folder / "text.png", OSError, "text.png: not a picture"),
        (folder / "half.png", OSError, "half.png: not a picture"),
        (f"{url}/text.png", OSError, "text.png: not a picture"),
        (f"{url}/other.png", OSError, "other.png: can't be downloaded.*404"),
        ("http://127.0.0.1:9/a.png", OSError, "can't be downloaded"),
    ]:
        with pytest.raises(kind, match=message):
            utils.load_image(source)


def test_a_server_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("minidiff.images.TIMEOUT", 0.1)
    timed_out = pytest.raises(OSError, match=r"can't be downloaded: .*timed out")
    with socket.create_server(("127.0.0.1", 0)) as silent, timed_out:
        utils.load_image(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")


def test_make_image_grid():
    images = [picture(seed=i) for i in range(6)]
    for rows, cols, resize in ((2, 3, None), (6, 1, 5), (1, 6, None)):
        ours, reference = (
            f(images, rows, cols, resize) for f in (utils.make_image_grid, diffusers.utils.make_image_grid)
        )
        assert ours.tobytes() == reference.tobytes()
    with pytest.raises(ValueError, match="images are 6, but rows x cols is 2 x 2"):
        utils.make_image_grid(images, 2, 2)


def test_tensors_and_arrays_to_pil():
    tensor = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    for ours, reference in [
        (utils.pt_to_pil(tensor), diffusers.utils.pt_to_pil(tensor)),
        (utils.numpy_to_pil(np.full((2, 5, 4, 1), 0.3)), diffusers.utils.numpy_to_pil(np.full((2, 5, 4, 1), 0.3))),
        (utils.numpy_to_pil(np.full((5, 4, 3), 0.7)), diffusers.utils.numpy_to_pil(np.full((5, 4, 3), 0.7))),
    ]:
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in reference]


def test_torch_utils():
    from diffusers.utils.torch_utils import randn_tensor as reference

    from minidiff.utils.torch_utils import is_compiled_module, randn_tensor, unwrap_module

    seeds = [torch.Generator().manual_seed(i) for i in range(3)], [torch.Generator().manual_seed(i) for i in range(3)]
    assert torch.equal(randn_tensor((3, 4), seeds[0]), reference((3, 4), seeds[1]))
    layer = torch.nn.Linear(2, 2)
    compiled = torch.compile(layer)
    assert (is_compiled_module(layer), is_compiled_module(compiled), is_compiled_module(3)) == (False, True, False)
    assert unwrap_module(compiled) is unwrap_module(layer) is layer


# Logging


def test_logging(capsys):
    logger, script = logging.get_logger(), logging.get_logger("minidiff.training")
    assert logging.get_verbosity() == logging.WARNING
    try:
        logging.HANDLER.setStream(sys.stderr)  # the one that capsys reads
        for level, shown in [("error", "E"), ("warning", "WE"), ("info", "IWE"), ("debug", "DIWE")]:
            getattr(logging, f"set_verbosity_{level}")()
            script.debug("D"), script.info("I"), script.warning("W"), logger.error("E")
            assert capsys.readouterr().err == "".join(f"{letter}\n" for letter in shown)
        logging.enable_explicit_format()
        script.warning("here")
        assert "[WARNING|test_doors.py:" in capsys.readouterr().err
        logging.disable_default_handler()
        script.warning("nobody hears this")
        assert capsys.readouterr().err == ""
    finally:
        logging.reset_format()
        logging.disable_default_handler()
        logging.enable_default_handler()
        logging.set_verbosity_warning()
        logging.HANDLER.setStream(sys.__stderr__)
    assert not python_logging.getLogger("minidiff").propagate


def test_bars_of_downloads():
    from huggingface_hub.utils import are_progress_bars_disabled

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    assert are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    assert logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_logging_has_the_references_functions():
    names = [
        name
        for name, value in vars(diffusers.utils.logging).items()
        if callable(value) and name[0].islower() and name not in ("warning_advice", "tqdm", "get_log_levels_dict")
    ]
    functions = [name for name in names if getattr(diffusers.utils.logging, name).__module__.endswith("utils.logging")]
    assert [name for name in functions if not hasattr(logging, name)] == []


# Averages


def steps(ema, model, n=7):
    """The averages after each of some steps of a training in which one parameter is frozen."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        for p in model.parameters():
            p.data.add_(torch.randn(p.shape, generator=generator))
        ema.step(model.parameters())
        found.append((ema.cur_decay_value, [p.clone() for p in ema.shadow_params]))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.5},
        {"use_ema_warmup": True},
        {"use_ema_warmup": True, "inv_gamma": 3.0, "power": 0.75, "decay": 0.3},
        {"update_after_step": 2, "min_decay": 0.4},
    ],
)
def test_averages_are_the_references(options):
    results = []
    for kind in (EMAModel, diffusers.training_utils.EMAModel):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        model.bias.requires_grad = False
        ema = kind(model.parameters(), **options)
        trace = steps(ema, model)
        ema.store(model.parameters())
        before = [p.clone() for p in model.parameters()]
        ema.copy_to(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, model.parameters(), strict=True))
        ema.restore(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        with pytest.raises(RuntimeError, match="restore"):
            ema.restore(model.parameters())
        results.append((trace, ema))
    for (a, ours), (b, theirs) in zip(*(trace for trace, _ in results), strict=True):
        assert a == b
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    (_, ours), (_, theirs) = results
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert {key: state[key] for key in training_utils.STATE} == {key: expected[key] for key in training_utils.STATE}
    fresh = EMAModel(torch.nn.Linear(3, 2).parameters())
    fresh.load_state_dict(expected)  # the reference's state, as accelerate keeps it
    assert all(torch.equal(a, b) for a, b in zip(fresh.shadow_params, ours.shadow_params, strict=True))
    assert fresh.get_decay(20) == theirs.get_decay(20)
    fresh.to(dtype=torch.float64)
    assert {p.dtype for p in fresh.shadow_params} == {torch.float64}


def test_averages_in_folders(tmp_path):
    """Ours loads what the reference wrote, the reference what we wrote."""
    reference, ours = twins("AutoencoderKL", narrow_config("stable-diffusion-v1-5", "vae")[1])
    there = diffusers.training_utils.EMAModel
    for kind, model, other, folder in ((EMAModel, ours, there, "a"), (there, reference, EMAModel, "b")):
        ema = kind(model.parameters(), inv_gamma=2.0, model_cls=type(model), model_config=model.config)
        steps(ema, model, 3)
        ema.save_pretrained(tmp_path / folder)
        loaded = other.from_pretrained(tmp_path / folder, model_cls=type(reference if kind is EMAModel else ours))
        assert (loaded.inv_gamma, loaded.optimization_step, loaded.decay) == (2.0, 3, 0.9999)
        parts = [torch.cat([p.flatten() for p in one.shadow_params]).sort().values for one in (loaded, ema)]
        assert torch.equal(*parts)  # both have their own order of parameters
    again = EMAModel.from_pretrained(tmp_path / "b", m.AutoencoderKL)
    again.save_pretrained(tmp_path / "c")
    assert EMAModel.from_pretrained(tmp_path / "c", m.AutoencoderKL).optimization_step == 3


def test_averages_say_what_is_wrong():
    model = torch.nn.Linear(3, 2)
    ema = EMAModel(model.parameters())
    for call, kind, message in [
        (lambda: EMAModel(model), TypeError, "model.parameters"),
        (lambda: ema.step([model.weight]), ValueError, "parameters are 1, but 2 are averaged"),
        (lambda: ema.load_state_dict({"decay": 2.0}), ValueError, "decay=2.0"),
        (lambda: ema.load_state_dict({"power": "3"}), ValueError, "power='3'"),
        (lambda: ema.load_state_dict({"gamma": 1.0}), ValueError, "unknown keys gamma"),
        (lambda: ema.load_state_dict({"shadow_params": [torch.zeros(1)]}), ValueError, "other shapes"),
        (lambda: ema.save_pretrained("a"), ValueError, "model_cls and model_config"),
    ]:
        with pytest.raises(kind, match=message):
            call()


def test_signal_to_noise():
    t = torch.tensor([[0, 3], [500, 999]])
    reference = diffusers.training_utils.compute_snr(diffusers.DDPMScheduler(), t)
    assert torch.equal(training_utils.compute_snr(m.DDPMScheduler(), t), reference)


def test_seeds_and_dtypes():
    drawn = []
    for _ in range(2):
        training_utils.set_seed(3)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    model = torch.nn.Linear(2, 2).half()
    model.bias.requires_grad = False
    training_utils.cast_training_params([model])
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.float16)


# Learning rates


@pytest.mark.parametrize("kind", list(optimization.SchedulerType), ids=lambda kind: kind.value)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (5, 20), (20, 20), (1, 7)])
@pytest.mark.parametrize("options", [{}, {"num_cycles": 3, "power": 2.0}])
def test_learning_rates_are_the_references(kind, warmup, steps, options):
    rates = []
    for get_scheduler in (optimization.get_scheduler, diffusers.optimization.get_scheduler):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        schedule = get_scheduler(
            kind.value,
            optimizer,
            step_rules="1:3,0.1:9,0.01",
            num_warmup_steps=warmup,
            num_training_steps=steps,
            **options,
        )
        rates.append([])
        # Beyond the end, with no steps after the warm-up, the reference's polynomial divides by zero
        for step in range(steps if warmup == steps else steps + 3):
            rates[-1].append(schedule.lr_lambdas[0](step))
        assert optimizer.param_groups[0]["lr"] == 0.3 * rates[-1][0]
    assert rates[0] == rates[1]


def test_each_schedule_has_the_references_function():
    names = [name for name in vars(diffusers.optimization) if name.startswith("get_")]
    assert [name for name in names if not hasattr(optimization, name)] == []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    linear = optimization.get_linear_schedule_with_warmup(optimizer, 2, 6, f_min=0.1, f_max=0.8)
    reference = diffusers.optimization.get_linear_schedule_with_warmup(optimizer, 2, 6, f_min=0.1, f_max=0.8)
    assert [linear.lr_lambdas[0](i) for i in range(9)] == [reference.lr_lambdas[0](i) for i in range(9)]


def test_learning_rates_say_what_is_wrong():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-8)
    for call, message in [
        (lambda: optimization.get_scheduler("cosin", optimizer), "name='cosin'.*cosine_with_restarts"),
        (lambda: optimization.get_scheduler("cosine", optimizer), "num_warmup_steps, num_training_steps must be"),
        (lambda: optimization.get_scheduler("piecewise_constant", optimizer), "step_rules must be"),
        (lambda: optimization.get_piecewise_constant_schedule(optimizer, "1,2"), "must read as in"),
        (lambda: optimization.get_polynomial_decay_schedule_with_warmup(optimizer, 0, 5), "lr_end=1e-07"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# The Hub


class FakeApi:
    """huggingface_hub's, as far as pushing goes: it notes what is asked of it."""

    def __init__(self, token=None):
        self.calls = {"token": token}
        FakeApi.last = self

    def create_repo(self, repo_id, **options):
        self.calls["create"] = {"repo_id": repo_id, **options}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self, folder_path, **options):
        self.calls["upload"] = options
        names = [file.relative_to(folder_path).as_posix() for file in Path(folder_path).rglob("*.*")]
        self.calls["files"] = sorted(names)
        return "https://huggingface.co/commit"


def test_push_to_hub(monkeypatch, tiny_models):
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    unet = tiny_models["UNet2DModel"]
    assert unet.push_to_hub("mine", private=True, token="t", subfolder="unet", variant="fp16") == (
        "https://huggingface.co/commit"
    )
    calls = FakeApi.last.calls
    assert calls["token"] == "t"
    assert calls["create"] == {"repo_id": "mine", "private": True, "exist_ok": True}
    assert calls["upload"] == {
        "repo_id": "someone/mine",
        "path_in_repo": "unet",
        "commit_message": "Upload UNet2DModel",
        "create_pr": False,
    }
    assert calls["files"] == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    m.DDIMScheduler().push_to_hub("mine", commit_message="Better", create_pr=True)
    assert FakeApi.last.calls["files"] == ["scheduler_config.json"]
    assert FakeApi.last.calls["upload"]["commit_message"] == "Better"
    assert FakeApi.last.calls["upload"]["create_pr"]
    with pytest.raises(ValueError, match="safe_serialization"):
        unet.push_to_hub("mine", safe_serialization=False)


# What isn't here


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxPipeline", "no FluxPipeline: it is another line of systems.*StableDiffusionPipeline.*use diffusers"),
        ("StableDiffusion3Pipeline", "another line of systems"),
        ("FlaxUNet2DConditionModel", "PyTorch alone"),
        ("DDIMSheduler", "did you mean DDIMScheduler"),
        ("UNet2DConditonModel", "did you mean UNet2DConditionModel"),
        ("DiffusionPipelin", "did you mean DiffusionPipeline"),
        ("AnotherScheduler", "no AnotherScheduler. It has .*DDIMScheduler.*use diffusers"),
        ("UNet3DConditionModel", "no video"),
        ("nothing_like_it", "has no nothing_like_it. For anything else use diffusers"),
    ],
)
def test_names_that_are_not_here(name, message):
    with pytest.raises(AttributeError, match=message):
        getattr(m, name)
    assert not hasattr(m, name)
    assert getattr(m, name, None) is None
    with pytest.raises(ImportError, match=message):
        exec(f"from minidiff import {name}")


PACKAGES = ("image_processor", "models", "optimization", "pipelines", "schedulers", "training_utils", "utils")


@pytest.mark.parametrize("door", [*PACKAGES, "utils.torch_utils", "utils.logging"])
def test_each_door_has_what_it_says_and_refuses_the_rest(door):
    module = importlib.import_module(f"minidiff.{door}")
    assert all(getattr(module, name) is not None for name in module.__all__)
    for name in ("FluxTransformer2DModel", "export_to_video"):
        with pytest.raises(ImportError, match=f"minidiff.{door} has no {name}.*use diffusers"):
            exec(f"from minidiff.{door} import {name}")
        with pytest.raises(AttributeError, match=f"has no {name}"):
            getattr(module, name)
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = module.__wrapped__


def test_no_public_name_of_diffusers_ends_in_a_bare_message():
    """Every one is there, or refused with our words."""
    for name in dir(diffusers):
        if name.startswith("_") or hasattr(m, name):
            continue
        with pytest.raises(AttributeError, match=f"^minidiff has no {name}"):
            getattr(m, name)


def test_imports_of_documentation():
    """As they stand there, but for the package's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in (
            "from minidiff.utils import load_image, make_image_grid, pt_to_pil, numpy_to_pil, logging",
            "from minidiff.utils.torch_utils import randn_tensor",
            "from minidiff.image_processor import VaeImageProcessor, PipelineImageInput",
            "from minidiff.training_utils import EMAModel, compute_snr, set_seed, cast_training_params",
            "from minidiff.optimization import get_scheduler, get_cosine_schedule_with_warmup",
            "from minidiff.models import AutoencoderKL, UNet2DConditionModel",
            "from minidiff.schedulers import DDIMScheduler, PNDMScheduler",
            "from minidiff.pipelines import StableDiffusionPipeline",
            "import minidiff; minidiff.utils.load_image; minidiff.training_utils.EMAModel; minidiff.utils.logging",
        ):
            exec(line)
