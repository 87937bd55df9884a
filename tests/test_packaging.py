"""The wheel: what is in it, and that it works where nothing but torch was imported."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("sparsedm_compile", "kernels", "passes", "pyproject.toml", "README.md", "LICENSE")

pytest.importorskip("setuptools", minversion="77", reason="builds the wheel; the extra 'test' installs it")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel installed, which ``PYTHONPATH`` puts before any other installation."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-deps", "--no-index", "--target", target)
    return target


@pytest.fixture
def python(installed, tmp_path):
    """Run code in a fresh interpreter that finds the package in the wheel alone."""

    def run(code):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_all_sources_are_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for folder, target in (("sparsedm_compile", ""), ("kernels", "sparsedm_compile"), ("passes", "sparsedm_compile")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".safetensors", ".typed"}:
                expected.add((Path(target) / path.relative_to(ROOT)).as_posix())
    assert expected
    assert expected <= inside, f"not in the wheel, add to pyproject.toml: {sorted(expected - inside)}"


def test_nothing_but_the_package_is_at_the_top_level(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sparsedm_compile"}


def test_folders_are_not_importable_by_their_own_names(python):
    found = python(
        "import importlib.util as u, sparsedm_compile.kernels, sparsedm_compile.passes\n"
        "print(sparsedm_compile.__file__, u.find_spec('kernels'), u.find_spec('passes'))"
    )
    assert found.endswith(" None None")


def test_backend_is_found_by_name_after_importing_torch_alone(python, installed):
    found = python(
        "import torch\n"
        "x, model = torch.randn(64, 128), torch.nn.Linear(128, 64)\n"
        "options = {'pattern': '2:4', 'policy': 'all'}\n"
        "with torch.no_grad():\n"
        "    y = torch.compile(model, backend='sparsedm', options=options)(x)\n"
        "import sparsedm_compile as sdm\n"
        "mask = sdm.magnitude_mask(model.weight, sdm.Pattern(2, 4))\n"
        "expected = torch.nn.functional.linear(x, model.weight * mask, model.bias)\n"
        "assert not torch.allclose(model(x), expected)\n"
        "torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)\n"
        "print(sdm.__file__)"
    )
    assert found == str(installed / "sparsedm_compile" / "__init__.py")


def test_command_is_installed(installed, python):
    assert (installed / "bin" / "sparsedm").exists()
    assert "Usage" in python(
        "import sys\n"
        "from sparsedm_compile.cli import app\n"
        "sys.argv = ['sparsedm', '--help']\n"
        "app(standalone_mode=False)"
    )
