"""The package as people install and import it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_nothing_heavy():
    """`import minidiff` costs a tenth of `import torch`: what takes its time is imported where it is used."""
    heavy = ("huggingface_hub", "transformers", "diffusers", "matplotlib", "torch._dynamo", "scipy", "pandas")
    out = run("-c", f"import sys, minidiff; print([name for name in {heavy} if name in sys.modules])")
    assert out == "[]\n"


def test_loading_a_model_does_not_import_torchs_compiler():
    """It takes a second, and a random first value on the meta device is enough to bring it in."""
    for name in ("tiny-emoji", "tiny-ddpm"):
        load = f"minidiff.DiffusionPipeline.from_pretrained(minidiff.bundled({name!r}))"
        assert run("-c", f"import sys, minidiff; {load}; print('torch._dynamo' in sys.modules)") == "False\n"


def test_wheel_works_outside_the_checkout(tmp_path):
    source = tmp_path / "source"  # building writes into its folder
    for name in ("minidiff", "weights_compat"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"minidiff", "weights_compat"}
    files = [file for top in tops for file in (source / top).rglob("*") if file.is_file()]
    assert {file.relative_to(source).as_posix() for file in files} <= names
    script = (
        "import sys; sys.path.insert(0, 'installed'); import minidiff, weights_compat.manifests as manifests;"
        "assert 'installed' in minidiff.__file__; print(manifests.read_manifest('stable-diffusion-v1-5').repository)"
    )
    assert run("-c", script, cwd=tmp_path) == "stable-diffusion-v1-5/stable-diffusion-v1-5\n"
