"""What the README says can be done."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from sparsedm_compile.cli import app
from sparsedm_compile.explain import Explanation
from sparsedm_compile.model_spec import load_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    sparsedm (.+)$", README, flags=re.MULTILINE)


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    loaded = load_model("digits", batch=2)
    names = {"model": loaded.model, "teacher": copy.deepcopy(loaded.model), "inputs": loaded.inputs}
    names["batches"] = [torch.randn(4, 1, 8, 8)]
    assert "steps=500" in code
    exec(code.replace("steps=500", "steps=1, progress=False"), names)
    assert names["plan"].patterns()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_spelled_right(command):
    name, *arguments = shlex.split(command)
    click_command = typer.main.get_command(app).commands[name]
    click_command.make_context(name, arguments)  # parses, and runs nothing


def test_the_sample_of_explain_is_what_it_prints():
    (sample,) = re.findall(r"```\n(layer .*?)```", README, flags=re.DOTALL)
    header, *lines, _, _ = sample.strip().splitlines()
    columns = [column.header for column in Explanation((), 1, "inference").__rich__().columns]
    assert re.split(r"  +", header) == columns
    begins = [header.index(column) for column in columns]
    rows = [[line[a:b].strip() for a, b in zip(begins, [*begins[1:], None], strict=True)] for line in lines]
    assert {" + ".join(kernel.split(" + ")[1:]) for *_, kernel, _, _, _ in rows} == {"", "gelu", "residual"}
    model = load_model("digits").model
    for name, _, shape, *_ in rows:
        assert shape == " x ".join(map(str, model.get_submodule(name).weight.shape))


def test_named_results_and_scripts_exist():
    paths = re.findall(r"\bbench/(?:results/)?[\w.-]+\.(?:json|py)", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
