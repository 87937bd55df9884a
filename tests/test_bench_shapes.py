"""What the benchmarks measure: shapes against numbers known from the models' papers and configs, and time limits."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsedm_compile.macs import count_macs

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def shapes_of():
    from model_list import MODELS
    from shapes import layer_shapes

    def derive(title):
        loaded = MODELS[title].load(device="meta")
        return {shape.name: (count, shape) for shape, count in layer_shapes(loaded).items()}, loaded

    return derive


def test_uvit_small(shapes_of):
    found, _ = shapes_of("U-ViT-S/2")
    # 13 blocks of width 512 on 16 x 16 patches and the time token; 6 of them begin with a skip linear.
    assert {name: count for name, (count, _) in found.items()} == {
        "linear 512->1536 @257": 13,
        "linear 512->512 @257": 13,
        "linear 512->2048 @257": 13,
        "linear 2048->512 @257": 13,
        "linear 1024->512 @257": 6,
    }


@pytest.mark.parametrize(
    ("title", "known"),
    [
        # Blocks x (q, k, v, out) of width 1152 on 256 patches.
        ("DiT-XL/2", {"linear 1152->1152 @256": 4 * 28, "linear 1152->4608 @256": 28, "linear 4608->1152 @256": 28}),
        # Widths 320 to 1280 at 64 x 64 to 8 x 8; feed-forward layers are gated, hence 8 times the width.
        ("SD 1.5 UNet", {"conv 3x3 320->320 @64x64": 7, "conv 3x3/2 320->320 @64x64": 1, "linear 320->2560 @4096": 5}),
        ("DDPM UNet 35M", {"conv 3x3 128->128 @32x32": 7, "conv 3x3 256->256 @4x4": 11}),
    ],
)
def test_diffusers_models(shapes_of, title, known):
    pytest.importorskip("diffusers")
    found, loaded = shapes_of(title)
    assert {name: found[name][0] for name in known} == known
    # Names tell shapes apart, and their MACs are those that torch's own formulas count, first and last layers left out.
    assert len(found) == len({shape for _, shape in found.values()})
    total = count_macs(loaded.model, *loaded.inputs, **loaded.kwargs).dense
    assert 0.95 * total < sum(count * shape.macs for count, shape in found.values()) < total


@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_and_macs_of_a_convolution(batch):
    from shapes import LayerShape

    shape = LayerShape("conv2d", (8, 4, 3, 3), (9, 7), (2, 2), (1, 1), (2, 2))
    assert shape.name == "conv 3x3/2 4->8 @9x7"
    x = torch.randn(shape.input_shape(batch))
    out = F.conv2d(x, torch.randn(shape.weight_shape), None, shape.stride, shape.padding, shape.dilation)
    assert shape.macs * batch == out.numel() * 4 * 9


def test_the_largest_shares_of_every_model_come_first():
    from kernels_cpu import cases
    from shapes import LayerShape

    small, large, other = (LayerShape("linear", (size, size), (16,)) for size in (8, 64, 32))
    # 100 small layers are 64 times 100 MACs, 2 large ones 4096 times 2.
    found = cases({small: {"A": 100}, other: {"B": 1}, large: {"A": 2}}, [4, 1], [2])
    assert [(case.shape, case.batch) for case in found] == [(o, b) for o in (other, large, small) for b in (4, 1)]


def test_error_is_measured_against_float64():
    from kernels_cpu import relative_error
    from shapes import LayerShape

    shape = LayerShape("linear", (8, 16), (4,))
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    exact = x.double() @ weight.double().T
    out = exact.clone()
    out[2, 5] += 0.25
    error = relative_error(shape.spec("dense"), x, weight, out)
    assert error == pytest.approx(0.25 / exact.abs().max().item())
    conv = LayerShape("conv2d", (8, 4, 3, 3), (6, 6), padding=(1, 1))
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    out = F.conv2d(x.double(), weight.double(), None, 1, 1)
    assert relative_error(conv.spec("dense"), x, weight, out) < 1e-12
    out[0, 3, 2, 2] = math.inf
    assert relative_error(conv.spec("dense"), x, weight, out) == math.inf


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        ("kernels_cpu", ["--dtypes", "foo"], "--dtypes: unknown dtype 'foo'; valid are float32, bfloat16, float16"),
        ("kernels_cpu", ["--dtypes", "nn"], "--dtypes: unknown dtype 'nn'"),
        ("kernels_cpu", ["--batches", "x"], "--batches: 'x' is not a whole number of at least 1"),
        ("kernels_cpu", ["--batches", "4,"], "--batches: '' is not a whole number"),
        ("kernels_cpu", ["--threads", "0"], "--threads: '0' is not a whole number of at least 1"),
        ("kernels_cpu", ["--patterns", "nonsense"], "--patterns: unknown pattern 'nonsense'"),
        ("kernels_cpu", ["--patterns", "2:4,dense"], "--patterns: dense is what each pattern is held against"),
        ("kernels_cpu", ["--out", "."], "--out: the path . is a folder: name a file"),
        (
            "kernels_cpu",
            ["--out", "file/sub/it.json"],
            "--out: the path file/sub/it.json: ",
        ),
        ("fidelity", ["--dtypes", "foo"], "--dtypes: unknown dtype 'foo'"),
        ("fidelity", ["--patterns", "4:2"], "--patterns: pattern 4:2 keeps 4 of every 2"),
        ("end_to_end", ["--patterns", "nonsense"], "--patterns: unknown pattern 'nonsense'"),
    ],
)
def test_bad_arguments_are_told_by_argparse(script, given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2
    assert f"{script}.py: error: argument {message}" in capsys.readouterr().err


def test_arguments_of_several_values():
    import arguments

    assert arguments.dtypes("bfloat16,float32,bfloat16") == [torch.bfloat16, torch.float32]
    assert arguments.patterns("2:4,1:4v4") == ["2:4", "1:4v4"]
    assert arguments.counts("4,1,4") == [4, 1]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TestBudget:
    def run(self, seconds, costs, slower=1.0):
        """What ran, and for how long it was timed, on a machine ``slower`` than expected."""
        from time_budget import Budget

        clock = Clock()
        budget = Budget(seconds, cost=costs.get, name=str, most=5.0, now=clock)
        ran = {}
        for case, timed in budget.cases(list(costs)):
            ran[case] = timed
            clock.now += costs[case] * slower + timed
        return ran, {gap["what"]: gap["why"] for gap in budget.left_out}, clock.now

    def test_what_is_left_is_shared(self):
        ran, left_out, spent = self.run(10.0, {"a": 2.0, "b": 4.0})
        assert ran == pytest.approx({"a": 2.0, "b": 2.0})
        assert not left_out
        assert spent == pytest.approx(10.0)

    def test_what_does_not_fit_is_named(self):
        ran, left_out, spent = self.run(10.0, {"a": 4.0, "huge": 50.0, "b": 5.0})
        assert list(ran) == ["a", "b"]
        assert left_out == {"huge": "does not fit the time limit"}
        assert spent <= 10.0

    def test_a_slow_machine_stops_in_time(self):
        ran, left_out, spent = self.run(10.0, dict.fromkeys("abcdefghij", 1.0), slower=3.0)
        assert list(ran) == ["a", "b", "c", "d"]
        assert set(left_out.values()) == {"earlier ones took longer than expected"}
        assert spent <= 10.0 + 3.0

    def test_no_case_is_timed_longer_than_shows_anything_new(self):
        ran, _, _ = self.run(1000.0, {"a": 1.0})
        assert ran == {"a": 5.0}
