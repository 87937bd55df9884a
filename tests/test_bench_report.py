"""Benchmark results: files, means, tables, plots, waterfalls, and what counts as slower."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from typer.testing import CliRunner

from sparsedm_compile.bench_report import (
    Results,
    compare,
    page,
    read_results,
    readme_block,
    replace_between_markers,
    write_results,
)
from sparsedm_compile.bench_report.plots import draw_plots
from sparsedm_compile.bench_report.results import read_folder
from sparsedm_compile.bench_report.summaries import geometric_mean, summarize_layers, summarize_models
from sparsedm_compile.bench_report.waterfall import _product, attention_ms, fused_ms, layer_ms, ran_ms, waterfall
from sparsedm_compile.cli import app
from sparsedm_compile.explain import LayerReport

PROVENANCE = {
    "command": "kernels_cpu.py",
    "date": "2026-01-02T03:04:05+00:00",
    "cpu": "A Processor",
    "vectors": "AVX2",
    "cores": 2,
    "load": 1.0,
    "gpus": [],
    "versions": {"torch": "2.13.0"},
}


def layer(
    name, pattern, ratio, *, dense_ms=10.0, rows=1028, batch=4, op="linear", dtype="float32", spread=0.02, uses=None
):
    return {
        "layer": name,
        "batch": batch,
        "threads": 2,
        "dtype": dtype,
        "pattern": pattern,
        "op": op,
        "input_rows": rows,
        "ratio": ratio,
        "spread": spread,
        "ms": dense_ms / ratio,
        "dense": "F.linear",
        "dense_ms": dense_ms,
        "gflops": 50.0,
        "dense_gflops": 80.0,
        "peak_share": 0.5,
        "bytes": 1e6,
        "error": 1e-6,
        "uses": uses or {"A": 1},
    }


def whole(case, pattern, ratio, *, spread=0.04, explained=1.1):
    ms = 200.0 / ratio
    return {
        "case": case,
        "title": f"Model {case}",
        "pattern": pattern,
        "threads": 2,
        "dtype": "float32",
        "ratio": ratio,
        "spread": spread,
        "ms": ms,
        "dense": "inductor",
        "dense_ms": 200.0,
        "error": 1e-6,
        "kernels": {"cpu": 3},
        "compile_seconds": 5.0,
        "waterfall": {
            "dense": {"linear": 150.0, "conv": 10.0, "attention": 20.0, "other": 20.0},
            "sparse": {"linear": ms - 50.0, "conv": 10.0, "attention": 20.0, "other": 20.0},
        },
        "explained_ms": explained * ms,
    }


def results(kind, rows, **changes):
    return Results(kind, rows, **{"provenance": PROVENANCE, "name": f"{kind}.json", **changes})


def cells(markdown, *start):
    """The cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    (row,) = [row for row in rows if row[: len(start)] == list(start)]
    return row


class TestFiles:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "layers.json"
        written = results(
            "layers",
            [layer("a", "2:4", 1.25), layer("b", "2:4", 2.0)],
            machine={"2": {"gflops": 150.0, "gbytes": 20.0}},
            left_out=[{"what": "c", "why": "no time"}],
        )
        write_results(path, written)
        assert read_results(path) == written
        assert [p.name for p in tmp_path.iterdir()] == ["layers.json"]

    def test_one_row_is_one_line(self, tmp_path):
        write_results(tmp_path / "x.json", results("layers", [layer(name, "2:4", 1.5) for name in "abc"]))
        assert sum('"layer":' in line for line in (tmp_path / "x.json").read_text().splitlines()) == 3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kind": "speeds"}, "unknown kind 'speeds'; there are layers, models"),
            ({"schema": 0}, "schema 0, this version reads 1"),
            ({"rows": [{"layer": "a"}]}, "row 0 of kind 'layers' lacks batch, threads, pattern, ratio"),
            ({"rows": [layer("a", "2:4", 1.5), layer("a", "2:4", 1.6)]}, "a, 4, 2, float32, 2:4 is there twice"),
            ({"rows": [layer("a", "2:4", 1.5) | {"ratio": None}]}, "ratio is None, not a number"),
            ({"rows": [layer("a", "2:4", 1.5) | {"ratio": float("nan")}]}, "ratio is nan, not a number"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path, change, message):
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(results("layers", [layer("a", "2:4", 1.5)]).to_dict() | change))
        with pytest.raises(ValueError, match=message) as raised:
            read_results(path)
        assert "bad.json" in str(raised.value)

    def test_layers_of_before_there_were_dtypes_are_float32(self, tmp_path):
        path = tmp_path / "old.json"
        content = results("layers", [layer("a", "2:4", 1.5), layer("a", "2:4", 1.2, dtype="bfloat16")]).to_dict()
        del content["rows"][0]["dtype"]
        path.write_text(json.dumps(content))
        old = read_results(path)
        assert [row["dtype"] for row in old.rows] == ["float32", "bfloat16"]
        assert "| linear, bfloat16 |" in page([old])
        assert not compare([old], [results("layers", [layer("a", "2:4", 1.5)])]).regressions

    def test_bad_rows_are_not_written(self, tmp_path):
        with pytest.raises(ValueError, match="lacks"):
            write_results(tmp_path / "x.json", results("layers", [{}]))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "no benchmark results")])
    def test_other_files_are_refused(self, tmp_path, text, message):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_results(tmp_path / "x.json")

    def test_folder_names_what_is_no_result_and_refuses_a_measurement_in_two_files(self, tmp_path):
        write_results(tmp_path / "a.json", results("layers", [layer("a", "2:4", 1.5)]))
        (tmp_path / "gpu.json").write_text('{"sections": []}')
        found, others = read_folder(tmp_path)
        assert [one.name for one in found] == ["a.json"]
        assert others == ["gpu.json"]
        write_results(tmp_path / "b.json", results("layers", [layer("a", "2:4", 1.6)]))
        with pytest.raises(ValueError, match=r"a\.json and b\.json: layers, a, 4, 2, float32, 2:4 is there twice"):
            read_folder(tmp_path)

    def test_an_empty_folder_and_none(self, tmp_path):
        with pytest.raises(ValueError, match="holds no benchmark results"):
            read_folder(tmp_path)
        with pytest.raises(NotADirectoryError, match="missing is not a folder"):
            read_folder(tmp_path / "missing")


class TestMeans:
    def test_by_hand(self):
        assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
        assert geometric_mean([2.0, 16.0], [2, 1]) == pytest.approx(4.0)  # (2 * 2 * 16) ** (1 / 3)

    @given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 5)), min_size=1, max_size=6))
    def test_a_weight_is_a_repetition(self, pairs):
        repeated = [number for number, weight in pairs for _ in range(weight)]
        expected = math.prod(repeated) ** (1 / len(repeated))
        numbers, weights = zip(*pairs, strict=True)
        assert geometric_mean(numbers, weights) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("numbers", "weights"), [([], None), ([1.0, 0.0], None), ([1.0], [1, 2]), ([1.0], [0]), ([1.0], [-1])]
    )
    def test_refuses(self, numbers, weights):
        with pytest.raises(ValueError, match="geometric_mean"):
            geometric_mean(numbers, weights)

    def test_layers_are_grouped(self):
        rows = [
            layer("a", "2:4", 1.0),
            layer("b", "2:4", 4.0),
            layer("c", "2:4", 0.5, rows=1),
            layer("d", "2:4", 1.3, op="conv2d", rows=4096),
            layer("a", "1:4", 3.0),
            layer("a", "2:4", 1.2, dtype="bfloat16"),
        ]
        found = {(one.group, one.pattern): one for one in summarize_layers(rows)}
        linear = found["linear", "2:4"]
        assert (linear.shapes, linear.worst, linear.best) == (2, 1.0, 4.0)
        assert linear.mean == pytest.approx(2.0)
        assert found["linear, under 16 rows", "2:4"].mean == pytest.approx(0.5)
        assert found["conv", "2:4"].mean == pytest.approx(1.3)
        assert found["linear", "1:4"].shapes == 1
        assert found["linear, bfloat16", "2:4"].mean == pytest.approx(1.2)

    def test_models_are_weighted_by_their_layers(self):
        rows = [
            layer("a", "2:4", 2.0, dense_ms=10.0, uses={"A": 3, "B": 1}),
            layer("b", "2:4", 0.5, dense_ms=6.0, uses={"A": 1}),
            layer("b", "2:4", 1.2, dtype="bfloat16", uses={"A": 1}),
        ]
        found = {one.model: one for one in summarize_models(rows)}
        # A, dense: 3 * 10 + 6 = 36 ms; sparse: 3 * 5 + 12 = 27 ms; the faster of both: 3 * 5 + 6 = 21 ms.
        assert found["A"].layers == 4
        assert found["A"].sparse == pytest.approx(36 / 27)
        assert found["A"].chosen == pytest.approx(36 / 21)
        assert found["A, bfloat16"].chosen == pytest.approx(1.2)
        assert found["B"].chosen == pytest.approx(2.0)


class TestMarkdown:
    def test_readme_has_models_and_means(self):
        block = readme_block(
            [
                results("models", [whole("m", "2:4", 1.6), whole("m", "1:4v4", 2.5, spread=0.1)], name="m.json"),
                results("layers", [layer("a", "2:4", 1.0), layer("b", "2:4", 4.0)]),
            ]
        )
        assert cells(block, "Model m") == ["Model m", "200 ms", "1.60 ± 0.02", "2.50 ± 0.05", "`m.json`"]
        assert cells(block, "linear") == ["linear", "4", "2", "2", "2.00 (1.00)"]
        assert "float32, 2 threads, A Processor (AVX2), 2 cores, torch 2.13.0, 2026-01-02" in block

    def test_a_pattern_that_one_model_lacks_is_blank(self):
        block = readme_block([results("models", [whole("m", "2:4", 1.6), whole("n", "1:4", 2.0)])])
        assert cells(block, "Model n") == ["Model n", "200 ms", "", "2.00 ± 0.02", "`models.json`"]

    def test_nothing_to_show(self):
        with pytest.raises(ValueError, match="no results of kind 'models' or 'layers'"):
            readme_block([])

    def test_only_what_is_between_the_markers_changes(self):
        text = "# Head\n<!-- results -->\nold\n<!-- /results -->\ntail\n"
        assert replace_between_markers(text, "new\n") == "# Head\n<!-- results -->\nnew\n<!-- /results -->\ntail\n"
        assert replace_between_markers(replace_between_markers(text, "new"), "old") == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "<!-- results -->",
            "<!-- /results --><!-- results -->",
            "<!-- results --><!-- results --><!-- /results -->",
        ],
    )
    def test_markers_that_do_not_fit(self, text):
        with pytest.raises(ValueError, match="need one <!-- results -->"):
            replace_between_markers(text, "new")

    def test_page_of_every_kind(self):
        scaling = {"sweep": "batch", "at": 8, "pattern": "2:4", "threads": 2, "ratio": 1.4, "spread": 0.02}
        cost = {"cost": "a call", "of": "F.linear", "threads": 1, "value": 4.25, "spread": 0.1, "unit": "us"}
        error = {
            "case": "U",
            "dtype": "bfloat16",
            "pattern": "2:4",
            "kernel": "dense",
            "dense_error": 1e-2,
            "spread": 0.0,
        }
        text = page(
            [
                results("models", [whole("m", "2:4", 2.0, explained=1.1), whole("n", "2:4", 2.0, explained=1.2)]),
                results(
                    "layers",
                    [layer("a", "2:4", 1.5)],
                    machine={"2": {"gflops": 150.0, "gbytes": 20.0}},
                    left_out=[{"what": f"b{i}", "why": "no time"} for i in range(7)],
                ),
                results("scaling", [scaling | {"ms": 10.0, "dense_ms": 14.0}]),
                results("costs", [cost]),
                results("fidelity", [error | {"layer": "a", "error": 1e-2}, error | {"layer": "b", "error": 4e-2}]),
            ]
        )
        assert cells(text, "Model m", "dense") == ["Model m", "dense", "150.0", "10.0", "20.0", "20.0", "200.0"]
        assert cells(text, "Model m", "2:4", "50.0") == ["Model m", "2:4", "50.0", "10.0", "20.0", "20.0", "100.0"]
        assert cells(text, "Model m", "2:4", "100 ms", "110 ms")[-2:] == ["+10%", "within"]
        assert cells(text, "Model n", "2:4", "100 ms", "120 ms")[-2:] == ["+20%", "**beyond**"]
        assert cells(text, "A", "4", "2", "2:4") == ["A", "4", "2", "2:4", "1", "1.50", "1.50"]
        assert cells(text, "a", "4", "2", "2:4")[4:] == ["1.50 ± 0.01", "F.linear", "10", "50", "50%", "1e-06"]
        assert cells(text, "layers.json", "2") == ["layers.json", "2", "150", "20.0"]
        assert "no time: b0; b1; b2; b3; b4 and 2 more" in text
        assert cells(text, "batch", "8") == ["batch", "8", "2", "2:4", "14 ms", "1.40 ± 0.01"]
        assert cells(text, "a call") == ["a call", "F.linear", "1", "4.25 us"]
        # The geometric mean of 0.01 and 0.04 is 0.02.
        assert cells(text, "U", "bfloat16") == ["U", "bfloat16", "2:4", "2", "2.0e-02", "4.0e-02", "b", "1.0e-02"]

    def test_dtypes_of_one_name_are_told_apart(self):
        half = {"dtype": "bfloat16"}
        models = [whole("m", "2:4", 2.0), whole("h", "2:4", 4.0) | {"title": "Model m", "dense_ms": 120.0} | half]
        layers = [layer("a", "2:4", 1.5), layer("a", "2:4", 3.0, **half)]
        text = page([results("models", models), results("layers", layers)])
        assert cells(text, "a", "4", "2", "2:4")[4] == "1.50 ± 0.01"
        assert cells(text, "a, bfloat16", "4", "2", "2:4")[4] == "3.00 ± 0.01"
        assert cells(text, "Model m", "dense")[-1] == "200.0"
        assert cells(text, "Model m, bfloat16", "dense")[-1] == "120.0"


class TestCompare:
    def test_a_planted_regression_and_no_noise(self):
        old = [results("layers", [layer(name, "2:4", 2.0, spread=0.04) for name in "abc"])]
        new = [
            results(
                "layers",
                [
                    layer("a", "2:4", 1.80, spread=0.04),  # 10% worse; 3% are tolerated and 2% are spread
                    layer("b", "2:4", 1.91, spread=0.04),  # 4.5% worse
                    layer("c", "2:4", 2.50, spread=0.04),
                ],
            )
        ]
        found = compare(old, new)
        (regression,) = found.regressions
        assert regression.what == "layers: a, batch 4, threads 2, float32, 2:4"
        assert regression.change == pytest.approx(-0.1)
        assert regression.noise == pytest.approx(0.05)
        assert "1 worse, 1 better" in str(found).replace("\n", " ")
        assert not compare(new, new).regressions
        assert len(compare(old, new, tolerance=0.0).regressions) == 2

    def test_a_slower_machine_is_no_regression_where_ratios_hold(self):
        row = whole("m", "2:4", 1.6)
        slow = row | {"ms": 3 * row["ms"], "dense_ms": 3 * row["dense_ms"]}
        assert not compare([results("models", [row])], [results("models", [slow])]).regressions

    def test_costs_get_worse_upwards_and_errors_by_factors(self):
        cost = {"cost": "a call", "of": "x", "threads": 1, "spread": 0.0, "unit": "us"}
        error = {"case": "U", "layer": "a", "dtype": "float32", "pattern": "2:4", "kernel": "cpu", "dense_error": 1e-6}

        def pair(value, size):
            return [
                results("costs", [cost | {"value": value}]),
                results("fidelity", [error | {"error": size, "spread": 0.0}]),
            ]

        assert not compare(pair(10.0, 1e-6), pair(10.2, 1.9e-6)).regressions
        assert {one.kind for one in compare(pair(10.0, 1e-6), pair(11.0, 3e-6)).regressions} == {"costs", "fidelity"}
        assert not compare(pair(10.0, 1e-6), pair(5.0, 1e-8)).regressions

    def test_what_only_one_has_is_told(self):
        old = [results("layers", [layer("a", "2:4", 2.0), layer("b", "2:4", 2.0)])]
        new = [results("layers", [layer("b", "2:4", 2.0), layer("c", "2:4", 2.0)])]
        found = compare(old, new)
        assert found.only_old == ("layers: a, batch 4, threads 2, float32, 2:4",)
        assert found.only_new == ("layers: c, batch 4, threads 2, float32, 2:4",)
        with pytest.raises(ValueError, match="none in common"):
            compare(old, [results("models", [whole("m", "2:4", 1.6)])])

    def test_what_was_timed_warm_on_one_side_alone_is_named(self):
        cold, warm = whole("m", "2:4", 1.6), whole("m", "2:4", 1.7) | {"warm": True}
        other = whole("n", "2:4", 2.0)
        found = compare([results("models", [cold, other])], [results("models", [warm, other])])
        assert found.timed_otherwise == ("models: m, 2:4, threads 2",)
        assert "timed warm in one of them alone: 1 (models: m, 2:4" in " ".join(str(found).split())
        for row in (cold | {"warm": False}, cold):
            assert not compare([results("models", [cold])], [results("models", [row])]).timed_otherwise
        assert not compare([results("models", [warm])], [results("models", [warm])]).timed_otherwise

    def test_a_negative_tolerance(self):
        with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
            compare([], [], tolerance=-1)


class TestWaterfall:
    def test_other_is_what_is_left(self):
        assert waterfall(100.0, {"linear": 60.0, "conv": 5.0}, 15.0) == {
            "linear": 60.0,
            "conv": 5.0,
            "attention": 15.0,
            "other": 20.0,
        }

    def test_layers_add_up_by_kind(self):
        layers = [
            LayerReport("a", "linear", (8, 8), "2:4", "cpu", 1.0, 2.0, ""),
            LayerReport("b", "linear", (8, 8), "2:4", "dense", 5.0, 4.0, ""),
            LayerReport("c", "conv2d", (8, 8, 1, 1), "2:4", "cpu", 3.0, 6.0, ""),
            LayerReport("d", "conv2d", (8, 8, 1, 1), "dense", "dense", None, None, ""),
        ]
        assert layer_ms(layers, ran_ms) == {"linear": 5.0, "conv": 3.0}
        assert layer_ms(layers, lambda layer: layer.dense_ms) == {"linear": 6.0, "conv": 6.0}
        assert layer_ms([replace(layers[0], calls=3), layers[1]], ran_ms) == {"linear": 7.0, "conv": 0.0}

    def test_every_attention_is_run(self, monkeypatch):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv = nn.Linear(16, 48)

            def forward(self, x):
                for tokens in (4, 4, 6):
                    q, k, v = self.qkv(x[:, :tokens]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
                    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, scale=0.5)
                return out

        seen = []

        def timed(candidates, **_):
            (run,) = candidates.values()
            out = run()
            seen.append((tuple(out.shape), out.transpose(1, 2).is_contiguous()))
            return {"": [0.001 if out.shape[2] == 4 else 0.010]}

        monkeypatch.setattr("sparsedm_compile.bench_report.waterfall.paired_times", timed)
        assert attention_ms(Net(), (torch.randn(3, 6, 16),), {}) == pytest.approx(2 * 1.0 + 10.0)
        assert sorted(shape for shape, _ in seen) == [(3, 2, 4, 8), (3, 2, 6, 8)]
        assert attention_ms(nn.Linear(8, 8), (torch.randn(2, 8),), {}) == 0.0

    def test_what_kernels_apply_counts_as_compiled_operators_less_what_the_kernels_take_for_it(self, monkeypatch):
        ran = []

        def timed(candidates, **_):
            misses = counters["stats"]["unique_graphs"]
            out = candidates["alone"]()
            assert counters["stats"]["unique_graphs"] == misses + 1
            ran.append((tuple(out.shape), out.dtype))
            return {"alone": [0.001 * out.shape[-1]], "plain": [0.010], "fused": [0.0115]}

        monkeypatch.setattr("sparsedm_compile.bench_report.waterfall.paired_times", timed)
        monkeypatch.setattr(
            "sparsedm_compile.bench_report.waterfall._product",
            lambda *_: dict.fromkeys(("plain", "fused"), lambda: torch.empty(2)),
        )
        torch._dynamo.reset()

        def report(fused, *shape, calls=1):
            return LayerReport("a", "linear", (8, 8), "2:4", "cpu", 1.0, 2.0, "", fused, shape, calls=calls)

        layers = [
            report(("gelu", "residual"), 2, 3),
            report(("gelu",), 2, 3),
            report(("geglu",), 2, 5, calls=2),
            report(()),
        ]
        assert fused_ms(layers, torch.empty(1, dtype=torch.bfloat16)) == pytest.approx((3 + 3 + 3 + 2 * 5) - 5 * 1.5)
        assert sorted(ran) == [((2, 3), torch.bfloat16)] * 2 + [((2, 5), torch.bfloat16)]
        assert fused_ms([report(())], torch.empty(1)) == 0.0

    @pytest.mark.parametrize("name", ["gelu", "silu", "residual"])
    def test_the_kernel_is_timed_with_what_it_fuses_and_without(self, name):
        runs = _product(name, 5, (16, 6), "cpu", "2:4", torch.empty(1))
        if not runs:
            pytest.skip("the cpu kernel runs nowhere here")
        plain, fused = runs["plain"](), runs["fused"]()
        assert plain.shape == (5, 16)
        expected = {"gelu": F.gelu, "silu": F.silu}.get(name, lambda x: x + runs["fused"].keywords["residual"])(plain)
        torch.testing.assert_close(fused, expected)


class TestCommands:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "results").mkdir()
        write_results(tmp_path / "results" / "m.json", results("models", [whole("m", "2:4", 1.6)]))
        machine = {"2": {"gflops": 150.0, "gbytes": 20.0}}
        write_results(tmp_path / "results" / "l.json", results("layers", [layer("a", "2:4", 1.5)], machine=machine))
        return tmp_path / "results"

    @staticmethod
    def run(*arguments):
        return CliRunner().invoke(app, ["bench", *map(str, arguments)])

    def test_report(self, folder, tmp_path):
        pytest.importorskip("matplotlib")
        readme = tmp_path / "README.md"
        readme.write_text("a\n<!-- results -->\n<!-- /results -->\nb\n")
        done = self.run("report", folder, "--out", tmp_path / "out", "--readme", readme)
        assert done.exit_code == 0, done.output
        assert cells(readme.read_text(), "Model m")[2] == "1.60 ± 0.02"
        text = (tmp_path / "out" / "report.md").read_text()
        plots = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
        stem = "l_batch4_threads2.png"
        assert plots == [f"plots/ratios_{stem}", f"plots/roofline_{stem}", "plots/waterfall.png"]
        assert all(f"]({plot})" in text for plot in plots)
        assert (tmp_path / "out" / plots[0]).read_bytes().startswith(b"\x89PNG")

    def test_a_plot_holds_one_dtype(self, tmp_path):
        pytest.importorskip("matplotlib")
        rows = [layer("a", "2:4", 1.5), layer("a", "2:4", 3.0, dtype="bfloat16")]
        machine = {"2": {"gflops": 150.0, "gbytes": 20.0}}
        drawn = draw_plots([results("layers", rows, machine=machine, name="l.json")], tmp_path)
        stem = "l_batch4_threads2"
        assert [path.stem for path in drawn] == [f"ratios_{stem}", f"roofline_{stem}", f"ratios_{stem}_bfloat16"]

    def test_report_refuses_before_it_writes(self, folder, tmp_path):
        (tmp_path / "README.md").write_text("no markers")
        done = self.run("report", folder, "--out", tmp_path / "out", "--readme", tmp_path / "README.md")
        assert done.exit_code == 2
        assert "need one <!-- results -->" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_compare_ends_with_1_if_something_got_slower(self, folder, tmp_path):
        slow = tmp_path / "slow.json"
        write_results(slow, results("models", [whole("m", "2:4", 1.2)]))
        assert self.run("compare", folder, folder).exit_code == 0
        done = self.run("compare", folder, slow, "--json")
        assert done.exit_code == 1
        (regression,) = json.loads(done.stdout)["regressions"]
        assert regression["what"] == "models: m, 2:4, threads 2"
        assert self.run("compare", folder, slow, "--tolerance", 0.3).exit_code == 0

    def test_compare_wants_one_machine(self, folder, tmp_path):
        elsewhere = tmp_path / "elsewhere.json"
        provenance = PROVENANCE | {"cpu": "Another"}
        write_results(elsewhere, results("models", [whole("m", "2:4", 1.6)], provenance=provenance))
        done = self.run("compare", folder, elsewhere)
        assert done.exit_code == 2
        assert "different machines (cpu A Processor, vectors AVX2, cores 2 against cpu Another" in done.stderr
        done = self.run("compare", folder, elsewhere, "--any-machine")
        assert done.exit_code == 0
        assert "different machines" in " ".join(done.stdout.split())

    def test_compare_wants_one_way_of_timing(self, folder, tmp_path):
        warm = tmp_path / "warm.json"
        write_results(warm, results("models", [whole("m", "2:4", 1.6) | {"warm": True}]))
        for pair in ((folder, warm), (warm, folder)):
            done = self.run("compare", *pair)
            assert done.exit_code == 2
            assert f"{pair[0]} and {pair[1]} alone: models: m, 2:4, threads 2" in done.stderr
            assert not done.stdout
        assert self.run("compare", folder, warm, "--any-timing").exit_code == 0

    def test_a_missing_file(self, tmp_path):
        done = self.run("compare", tmp_path / "missing.json", tmp_path)
        assert done.exit_code == 2
        assert "missing.json" in done.stderr
