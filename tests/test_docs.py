"""What the docs name exists, and the tests that they point to are found."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.data import DataLoader

from sparsedm_compile.cli import app
from sparsedm_compile.demo.digits import load_digits
from sparsedm_compile.models import UViT

ROOT = Path(__file__).parents[1]
CLAIMS = (ROOT / "docs" / "claims.md").read_text()
COMMANDS = re.findall(r"`pytest ([^`]+)`", CLAIMS)


def test_all_twelve_claims_are_there():
    assert re.findall(r"^\| (\d+) \|", CLAIMS, flags=re.MULTILINE) == [str(i) for i in range(1, 13)]


def test_paths_exist():
    paths = [word for command in COMMANDS for word in shlex.split(command) if word.startswith("tests/")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if " -k " in command])
def test_selected_tests_exist(command):
    *paths, _, expression = shlex.split(command)
    files = [
        file
        for path in paths
        for file in ((ROOT / path).rglob("test_*.py") if (ROOT / path).is_dir() else [ROOT / path])
    ]
    names = re.findall(
        r"^ *(?:def|class) (test\w*)", "\n".join(file.read_text() for file in files), re.MULTILINE | re.I
    )
    for word in expression.split(" or "):
        assert any(word.lower() in name.lower() for name in names), word


QUALITY = (ROOT / "docs" / "quality.md").read_text()


def test_the_guide_to_quality_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2)
    with torch.no_grad():  # untrained weights are too alike for permutations to matter
        for parameter in model.parameters():
            parameter *= torch.linspace(0.5, 1.5, parameter.shape[-1])
    names = {"model": model, "loader": DataLoader(load_digits()[0][:64], 16)}
    blocks = re.findall(r"```python\n(.*?)```", QUALITY, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert names["images"].shape == (4, 1, 8, 8)
    assert (tmp_path / "sparse.safetensors").exists()


@pytest.mark.parametrize("command", re.findall(r"^    sparsedm (.+)$", QUALITY, flags=re.MULTILINE))
def test_commands_of_the_guide_are_spelled_right(command):
    name, *arguments = shlex.split(command)
    typer.main.get_command(app).commands[name].make_context(name, arguments)
