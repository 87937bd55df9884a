"""The command line: results on stdout, bad input in one line on stderr with exit status 2."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sparsedm_compile.bench_report import read_results
from sparsedm_compile.cli import app
from sparsedm_compile.models import create_uvit

TINY = {"img_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path):
    """Arguments that turn the preset uvit-s/2 into a small one."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return ["uvit-s/2", "--config", str(path)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def invoke(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return invoke


def succeed(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def read_png(path: Path) -> tuple[int, int, int, bytes]:
    """Width, height, colour type and pixels of a PNG without line filters."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        (crc,) = struct.unpack(">I", data[position + 8 + length : position + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        position += 12 + length
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert depth == 8
    return width, height, colour, zlib.decompress(chunks[b"IDAT"])


class TestMacs:
    # SPARSEDM: CIFAR-10 U-ViT-S/2: 11.32 linear + conv, 0.88 attention, 6.07 at 2:4 as trained, 5.66 with skip.
    @pytest.mark.parametrize(("policy", "sparse"), [("sparsedm", 6.07), ("sparsedm+skip", 5.66)])
    def test_the_published_numbers(self, run, policy, sparse):
        report = succeed(run("macs", "uvit-s/2", "--pattern", "2:4", "--policy", policy, "--json"))
        assert round(report["dense"] / 1e9, 2) == 11.32
        assert round(report["attention"] / 1e9, 2) == 0.88
        assert round(report["sparse"] / 1e9, 2) == sparse
        assert sum(row["dense"] for row in report["layers"] if row["kind"] != "attention") == report["dense"]

    def test_batch_and_rules(self, run):
        one = succeed(run("macs", "uvit-s/2", "--json"))
        four = succeed(run("macs", "uvit-s/2", "--batch", 4, "--rule", "*=2:4", "--rule", "*=dense", "--json"))
        assert four["dense"] == four["sparse"] == 4 * one["dense"]
        assert one["sparse"] < one["dense"]

    def test_a_model_too_big_for_memory(self, run):
        pytest.importorskip("diffusers")
        report = succeed(run("macs", "diffusers:FluxTransformer2DModel", "--json"))
        assert report["params"] > 11.8e9
        assert 0.49 < report["sparse"] / report["dense"] < 0.51

    def test_prints_a_table(self, run):
        result = run("macs", "uvit-s/2")
        assert result.exit_code == 0
        assert "11.32 G" in result.stdout
        assert "in_blocks.0.attn.qkv" in result.stdout


def test_factory_in_the_working_directory_and_nothing_but_json_on_stdout(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def make(batch):\n"
        "    print('chatter')\n"
        "    return torch.nn.Linear(64, 32), torch.randn(batch, 64)\n"
    )
    report = succeed(run("macs", "mine:make", "--policy", "all", "--batch", 3, "--json"))
    assert report["dense"] == 3 * 64 * 32
    assert report["sparse"] == 3 * 64 * 32 // 2


def test_explain_lists_every_layer(run, tiny):
    report = succeed(run("explain", *tiny, "--pattern", "2:4", "--rule", "*.mlp.*=1:4", "--threads", 1, "--json"))
    assert report["mode"] == "inference"
    with torch.device("meta"):
        model = create_uvit("uvit-s/2", **TINY)
    layers = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert report["layers"].keys() == layers
    assert report["layers"]["mid_block.mlp.fc1"]["pattern"] == "1:4"
    assert report["layers"]["mid_block.attn.qkv"]["pattern"] == "2:4"
    assert report["layers"]["decoder_pred"]["pattern"] == "dense"
    assert all(layer["reason"] for layer in report["layers"].values())


def test_bench_reports_and_writes_a_results_file(run, tiny, tmp_path):
    arguments = ["bench", "model", *tiny, "--pattern", "2:4", "--pattern", "1:4v4", "--batch", 2, "--seconds", 0]
    report = succeed(run(*arguments, "--out", "results/tiny.json", "--json"))
    written = read_results(tmp_path / "results/tiny.json")
    assert [row["ms"] for row in written.rows] == pytest.approx([row["ms"] for row in report["patterns"]], rel=1e-5)
    assert [row["pattern"] for row in report["patterns"]] == ["2:4", "1:4v4"]
    assert all(row["relative_error"] < 1e-5 for row in report["patterns"])
    assert all(row["speedup"] > 0 and row["ms"] > 0 for row in report["patterns"])
    assert report["baseline"] in report["dense_ms"]
    assert report["shapes"] == [[2, 3, 8, 8], [2]]
    assert {"command", "date", "cpu", "versions"} <= report["provenance"].keys()


class TestSample:
    @pytest.mark.parametrize("pattern", ["dense", "2:4"])
    def test_writes_a_grid_from_a_checkpoint(self, run, tiny, tmp_path, pattern):
        torch.manual_seed(1)
        save_file(create_uvit("uvit-s/2", **TINY).state_dict(), tmp_path / "tiny.safetensors")
        result = run(
            *("sample", *tiny, "--checkpoint", "tiny.safetensors", "--pattern", pattern),
            *("--count", 5, "--steps", 2, "--out", "out/grid.png", "--json"),
        )
        assert succeed(result)["picture"] == "out/grid.png"
        width, height, colour, pixels = read_png(tmp_path / "out/grid.png")
        assert (width, height, colour) == (3 * 64, 2 * 64, 2)  # 5 images of 8 x 8, enlarged to 64, on a 3 x 2 grid
        assert len(set(pixels)) > 2

    def test_the_packaged_digits(self, run, tmp_path):
        report = succeed(run("sample", "--count", 4, "--steps", 2, "--json"))
        assert report["model"] == "digits"
        assert read_png(tmp_path / "samples.png")[2] == 0

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("uvit-s/2", "pass --checkpoint"),
            ("uvit-l/2", "latents of 4 channels"),
            ("uvit-t2i-s/2", "without text"),
        ],
    )
    def test_refuses_what_it_cannot_sample(self, run, tiny, model, message):
        refused(run("sample", model, *tiny[1:]), message)

    def test_refuses_a_class_where_there_is_none(self, run):
        refused(run("sample", "digits", "--label", 3), "takes no class")


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uvit-s/3"], "did you mean 'uvit-s/4'?"),
        (["nope"], "uvit-t2i-s/2"),  # all presets are listed
        (["uvit-s/2", "--pattern", "5:4"], "n must be smaller than m"),
        (["uvit-s/2", "--pattern", "two"], "unknown pattern 'two'"),
        (["uvit-s/2", "--policy", "none"], "unknown policy 'none'"),
        (["uvit-s/2", "--rule", "2:4"], "not GLOB=PATTERN"),
        (["uvit-s/2", "--rule", "nothing.*=2:4"], "matches no layer"),
        (["uvit-s/2", "--batch", "0"], "batch must be at least 1"),
        (["uvit-s/2", "--config", "missing.json"], "missing.json does not exist"),
        (["uvit-s/2", "--config", "broken.json"], "is not JSON"),
        (["uvit-s/2", "--config", "list.json"], "must hold a JSON object"),
        (["uvit-s/2", "--config", "unknown.json"], "takes no argument width; valid are img_size, patch_size"),
        (["uvit-s/2", "--config", "."], "config . is a folder: name the JSON file in it"),
        (["no_such_module:make"], "No module named 'no_such_module'"),
        (["json:missing"], "has no 'missing'"),
        (["json:decoder"], "not a function"),
        (["fractions:Fraction"], "returned Fraction"),
        (["json:loads"], "the factory raised TypeError"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, tmp_path, arguments, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"width": 3}')
    refused(run("macs", *arguments, "--json"), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diffusers:UNet2DModle"], "did you mean UNet2DModel"),
        (["diffusers:DDIMScheduler"], "is no model"),
        (["diffusers:AutoencoderKL"], "inputs of diffusers' AutoencoderKL are not known"),
        (["diffusers:UNet2DModel", "--config", "other.json"], "the config is for DiTTransformer2DModel"),
        (["diffusers:UNet2DModel", "--config", "odd.json"], "cannot be built from this config"),
        (
            ["diffusers:UNet2DModel", "--config", "misspelled.json"],
            "does not take: smaple_size, width; valid are sample_size",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_diffusers_input_is_one_line(run, tmp_path, arguments, message):
    pytest.importorskip("diffusers")
    (tmp_path / "other.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    (tmp_path / "misspelled.json").write_text('{"_diffusers_version": "0.1", "smaple_size": 32, "width": 3}')
    (tmp_path / "odd.json").write_text(
        '{"block_out_channels": [32], "down_block_types": ["DownBlock2D", "DownBlock2D"]}'
    )
    refused(run("macs", *arguments, "--json"), message)


def test_without_diffusers_the_message_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(run("macs", "diffusers:UNet2DModel"), "pip install 'sparsedm-compile[diffusers]'")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("missing.safetensors", "does not exist"),
        (".", "checkpoint . is a folder"),
        ("garbage.safetensors", "not a checkpoint"),
        ("garbage.pth", "not a checkpoint"),
        ("list.pth", "holds list"),
        ("few.safetensors", "lacks"),
        ("wide.safetensors", "has shape (1, 17, 128), the model has (1, 17, 64)"),
    ],
)
def test_bad_checkpoints_are_one_line(run, tiny, tmp_path, checkpoint, message):
    for name in ("garbage.safetensors", "garbage.pth"):
        (tmp_path / name).write_bytes(b"not weights at all")
    torch.save([1, 2], tmp_path / "list.pth")
    state = create_uvit("uvit-s/2", **TINY).state_dict()
    save_file({"pos_embed": state["pos_embed"]}, tmp_path / "few.safetensors")
    save_file({**state, "pos_embed": torch.zeros(1, 17, 128)}, tmp_path / "wide.safetensors")
    refused(run("explain", *tiny, "--checkpoint", checkpoint), message)


COMMANDS = {
    "sample": ["sample"],
    "bench model": ["bench", "model", "digits"],
    "bench report": ["bench", "report", "results"],
    "demo": ["demo"],
    "train": ["train", "digits"],
    "finetune": ["finetune", "digits"],
    "quality": ["quality", "digits"],
}
FILES = ("sample", "bench model")  # what --out names


class TestOut:
    @pytest.fixture(autouse=True)
    def places(self, tmp_path, run):  # run: in the working directory
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("kept")
        yield
        assert (tmp_path / "file").read_text() == "kept"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
        assert not list((tmp_path / "folder").iterdir())

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_folder_for_a_file_or_the_reverse(self, run, command):
        place, told = (
            ("folder", "is a folder: name a file") if command in FILES else ("file", "is a file: name a folder")
        )
        refused(run(*COMMANDS[command], "--out", place), f"--out {place} {told}")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_below_a_file(self, run, command):
        message = f"--out file/sub/it: {Path.cwd() / 'file'} is a file, not a folder; choose another path"
        refused(run(*COMMANDS[command], "--out", "file/sub/it"), message)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_no_permission(self, run, command, monkeypatch):
        monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write wherever it likes
        message = f"--out folder/sub/it cannot be written: no permission to write to {Path.cwd() / 'folder'}; choose"
        refused(run(*COMMANDS[command], "--out", "folder/sub/it"), message)

    @pytest.mark.parametrize("command", FILES)
    def test_a_file_that_may_be_written_in_a_folder_that_may_not(self, run, command, monkeypatch):
        """It is written beside its place first."""
        monkeypatch.setattr("os.access", lambda path, mode: Path(path).is_file())
        refused(run(*COMMANDS[command], "--out", "file"), f"no permission to write to {Path.cwd()}; choose")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system that takes no files")
@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_system_that_takes_no_file_is_told_in_one_line(run, command):
    refused(run(*COMMANDS[command], "--out", "/proc/none/run"), "choose another path")


def test_a_disk_that_fills_up_is_told_in_one_line_behind_the_figures(run, tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "tiny.part")

    module = sys.modules["sparsedm_compile.cli.bench"]  # by its dotted name, pytest finds the command of that name
    report = SimpleNamespace(to_dict=lambda: {"patterns": ["2:4"]})
    for name, stand_in in (("bench_model", lambda *_, **__: report), ("model_results", lambda *_: None)):
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(module, "write_results", full)
    result = run("bench", "model", *tiny, "--out", "tiny.json", "--json")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "error: tiny.part: No space left on device; choose another path, or see to this one"
    )
    assert json.loads(result.stdout) == report.to_dict()


def test_what_fails_in_the_computing_looks_like_a_bug(run, tiny, monkeypatch):
    def no_compiler(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "g++")

    monkeypatch.setattr(sys.modules["sparsedm_compile.cli.bench"], "write_results", no_compiler)
    module = sys.modules["sparsedm_compile.cli.bench"]
    report = SimpleNamespace(to_dict=dict)
    for name, stand_in in (("bench_model", lambda *_, **__: report), ("model_results", lambda *_: None)):
        monkeypatch.setattr(module, name, stand_in)
    result = run("bench", "model", *tiny, "--out", "tiny.json", "--json")
    assert isinstance(result.exception, FileNotFoundError)


def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).with_name("sparsedm")
    if not command.exists():
        pytest.skip("the package is not installed with its script here")
    done = subprocess.run([command, "macs", "uvit-s/9"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown model 'uvit-s/9'")
