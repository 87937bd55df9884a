"""``make gpu`` without a GPU: arguments, budgets, records and reports, on stand-ins for device and kernels."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsedm_compile.kernels.cuda.tiles import TILES
from sparsedm_compile.kernels.reference.kernel import ReferenceKernel
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.pattern import Pattern

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def gpu():
    import gpu

    return gpu


class FakeTime:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def steps(time, seconds, count, **fields):
    def run(clock):
        for i in range(count):
            time.now += seconds
            yield {"i": i} | fields

    return run


def test_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no CUDA device; nothing was measured" in done.stderr
    assert not done.stdout
    # -S: a Python without torch
    done = subprocess.run([sys.executable, "-S", BENCH / "gpu.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch cannot be imported" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "linears,x"], "unknown section x; there are checks"), (["--minutes", "0"], "must be positive, got 0")],
)
def test_refuses_bad_arguments(gpu, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        gpu.parse(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_from_a_checkout_that_is_not_installed(tmp_path):
    # -S leaves out site-packages, the editable install with it; torch's own folder is put back by hand
    site = Path(torch.__file__).parent.parent
    code = (
        f"import sys; sys.path[:0] = [{str(BENCH)!r}, {str(site)!r}]; import gpu; gpu.make_importable();"
        "import sparsedm_compile.kernels as k, sparsedm_compile.passes as p; print(k.__file__, p.__file__);"
        "import importlib.util; print(importlib.util.find_spec('kernels'))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert str(BENCH.parent / "kernels" / "__init__.py") in done.stdout
    assert done.stdout.strip().endswith("None")  # no top-level package "kernels" came with it


def test_time_that_one_section_leaves_goes_to_the_next():
    from gpu_runner import Clock, Section, run_sections

    time = FakeTime()
    sections = [
        Section("a", 1, steps(time, 1, 5)),
        Section("b", 1, steps(time, 10, 99)),
        Section("c", 2, steps(time, 1, 3)),
    ]
    outcomes = run_sections(sections, Clock(100, time), lambda _: None)
    assert [o.budget_s for o in outcomes] == [25.0, pytest.approx(95 / 3, abs=0.1), pytest.approx(55, abs=0.1)]
    assert [len(o.records) for o in outcomes] == [5, 4, 3]
    assert [o.stopped for o in outcomes] == [None, "its time was up", None]


def test_one_failure_does_not_cost_the_others_and_all_is_saved():
    from gpu_runner import Clock, Section, Skipped, run_sections

    def fails(clock):
        yield {"i": 0}
        raise RuntimeError("CUDA error:\n an illegal memory access")

    def skips(clock):
        raise Skipped("compute-sanitizer is not installed")
        yield

    time, saved = FakeTime(), []
    sections = [Section("x", 1, fails), Section("y", 1, skips), Section("z", 1, steps(time, 200, 9))]
    sections.append(Section("late", 1, steps(time, 1, 1)))
    outcomes = run_sections(sections, Clock(100, time), lambda o: saved.append(len(o)))
    assert [o.stopped for o in outcomes] == [
        "RuntimeError: CUDA error: an illegal memory access",
        "skipped: compute-sanitizer is not installed",
        "its time was up",
        "skipped: no time was left",
    ]
    assert outcomes[0].records == [{"i": 0}]
    assert saved[0] == 1


def test_the_report_is_json_with_machine_and_sections(tmp_path):
    from gpu_runner import Outcome, write_json

    path = tmp_path / "gpu.json"
    write_json(path, {"gpus": ["H"], "command": "gpu.py"}, [Outcome("checks", 10.0, 2.0, None, [{"ok": True}])])
    report = json.loads(path.read_text())
    assert report["gpus"] == ["H"]
    assert report["sections"] == [
        {"name": "checks", "budget_s": 10.0, "spent_s": 2.0, "stopped": None, "records": [{"ok": True}]}
    ]


def cpu_spec(dtype=torch.bfloat16):
    return LayerSpec("linear", (64, 64), Pattern(2, 4), dtype, "cpu")


def test_a_right_kernel_passes_and_each_kind_of_wrong_one_fails():
    import gpu_checks

    def verdict(kernel, spec=None):
        return gpu_checks.check("k", kernel, spec or cpu_spec(), (9, 64), "silu")

    class Right(ReferenceKernel):  # fp32 inside, one rounding, as the GPU kernels
        def linear(self, x, values, index, spec, epilogue):
            wide = Epilogue(*(None if t is None else t.float() for t in (epilogue.bias,)), epilogue.activation)
            out = super().linear(x.float(), values.float(), index, spec, wide)
            return (out if epilogue.residual is None else out + epilogue.residual).to(x.dtype)

    class Transposed(Right):
        def linear(self, x, values, index, spec, epilogue):
            return super().linear(x, values.flip(0), index.flip(0), spec, epilogue)

    class Unwritten(Right):
        def linear(self, x, *rest):
            out = super().linear(x, *rest)
            if epilogue_is_on(rest):
                return torch.cat((out[:-1], torch.empty_like(out[-1:])))
            return out

    class Imprecise(Right):
        def linear(self, x, *rest):
            return super().linear(x, *rest) * (1 + 0.02 * epilogue_is_on(rest))

    class Raising(Right):
        def pack(self, weight, spec):
            raise RuntimeError("out of memory")

    class Forgetful(Right):
        def unpack(self, values, index, spec):
            return super().unpack(values, index, spec) * 0.5

        def linear(self, x, values, index, spec, epilogue):
            return Right().linear(x, values, index, spec, epilogue)

    def epilogue_is_on(rest):
        return rest[-1].residual is not None

    for dtype in (torch.bfloat16, torch.float16):
        assert verdict(Right(), cpu_spec(dtype))["ok"] is True
    assert "is wrong at out" in verdict(Transposed())["why"]
    assert "nan" in verdict(Unwritten())["why"]
    assert "relative error 1." in verdict(Imprecise())["why"] or "relative error 2." in verdict(Imprecise())["why"]
    assert "RuntimeError: out of memory" in verdict(Raising())["why"]
    assert "inf" in verdict(Forgetful())["why"]


def test_a_kernel_that_takes_nothing_is_named_with_its_reason(monkeypatch):
    import gpu_checks

    assert "cuda" in gpu_checks.sparse_kernels("cuda")
    assert "cpu" not in gpu_checks.sparse_kernels("cuda")
    (record,) = gpu_checks.checks(["cuda"])
    assert record == {"kernel": "cuda", "ok": None, "why": "no CUDA device"}


CHILD = """
import json, pathlib, sys
name, out = sys.argv[sys.argv.index("--kernels") + 1], pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
records = [{"kernel": name, "ok": True}]
(out / "gpu-x.json").write_text(json.dumps({"sections": [{"records": records}]}))
if name == "crashes":
    print("illegal memory access"); sys.exit(134)
if name == "hangs":
    import time; time.sleep(60)
"""


def test_a_kernel_that_ends_its_process_costs_only_itself(tmp_path):
    from gpu_checks import isolated_checks
    from gpu_runner import Clock

    child = tmp_path / "child.py"
    child.write_text(CHILD)
    records = list(isolated_checks(Clock(3), ["good", "crashes", "hangs"], [sys.executable, str(child)]))
    assert [(r["kernel"], r["ok"]) for r in records] == [
        ("good", True),
        ("crashes", True),
        ("crashes", False),
        ("hangs", True),
    ]
    assert "status 134: illegal memory access" in records[2]["why"]


def test_only_what_was_shown_to_be_right_is_timed(gpu, monkeypatch):
    import gpu_checks
    from gpu_runner import Clock

    records = [("a", True), ("b", True), ("b", False), ("c", None), ("a", True)]
    monkeypatch.setattr(
        gpu_checks, "isolated_checks", lambda *_: iter([{"kernel": kernel, "ok": ok} for kernel, ok in records])
    )
    banned = set()
    (section,) = gpu.sections(gpu.parse(["--only", "checks", "--kernels", "a,b,c,d"]), banned)
    assert len(list(section.run(Clock(10)))) == 5
    assert banned == {"b", "c", "d"}


def test_candidates_name_every_kernel_or_why_not(monkeypatch):
    import gpu_timing

    x = torch.randn(8, 64, dtype=torch.float32)

    def spec_of(pattern):
        return LayerSpec("linear", (64, 64), Pattern.parse(pattern), torch.float32, "cuda")

    monkeypatch.setattr(gpu_timing, "sparse_kernels", lambda device: ["reference", "cuda"])
    candidates, reasons = gpu_timing.layer_candidates(spec_of, x, set())
    assert list(candidates) == ["dense", "reference 2:4"]
    assert candidates["reference 2:4"]().shape == (8, 64)
    assert reasons == {"cuda": "the cuda kernel takes bfloat16 and float16, not float32"}
    candidates, reasons = gpu_timing.layer_candidates(spec_of, x, {"reference"})
    assert list(candidates) == ["dense"]
    assert reasons["reference"] == "not shown to be right"


def test_a_race_reports_gains_and_failures(monkeypatch):
    import gpu_timing

    monkeypatch.setattr(gpu_timing, "capture", lambda run, calls: (run(), run)[1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    big, small = torch.randn(400, 400), torch.randn(40, 40)
    results = gpu_timing.race({"dense": lambda: big @ big, "k": lambda: small @ small, "bad": fail}, seconds=0.02)
    assert results["dense"]["gain"] == 1
    assert results["k"]["gain"] > 1
    assert results["k"]["us"] > 0
    assert "capturing" in results["bad"]["why"]


def test_shapes_are_those_of_the_models():
    import gpu_shapes

    from sparsedm_compile.models import uvit_presets

    by_name = {layer.name: layer for layer in gpu_shapes.LINEARS}
    for name, preset in (("U-ViT-S/2", "uvit-s/2"), ("U-ViT-L/2", "uvit-l/2"), ("U-ViT-H/2", "uvit-h/2")):
        config = uvit_presets()[preset]
        dim, patches = config["embed_dim"], (config["img_size"] // config["patch_size"]) ** 2
        assert by_name[f"{name} qkv"].tokens == patches + (2 if config.get("num_classes", -1) > 0 else 1)
        assert (by_name[f"{name} fc1"].width, by_name[f"{name} fc1"].rows) == (dim, 4 * dim)
        assert (by_name[f"{name} fc2"].width, by_name[f"{name} fc2"].rows) == (4 * dim, dim)
    assert len(gpu_shapes.GRID) == 12


@pytest.fixture
def on_cpu(monkeypatch):
    """The micro benchmarks at small sizes on the CPU, with one sparse kernel that takes all that is said to be CUDA."""
    import gpu_shapes
    import gpu_timing

    class OnCpu(ReferenceKernel):
        def refusal(self, spec):
            return None

    randn, kernels = torch.randn, {"reference": OnCpu(), "cuda": gpu_timing.get_kernel("cuda")}
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **kwargs: randn(*size, **kwargs))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_timing, "capture", lambda run, calls: (run(), run)[1])
    monkeypatch.setattr(gpu_timing, "sparse_kernels", lambda device: list(kernels))
    monkeypatch.setattr(gpu_timing, "get_kernel", kernels.__getitem__)
    monkeypatch.setattr(
        gpu_timing, "paired_times", lambda runs, **_: {n: [r() is None or 0.5] for n, r in runs.items()}
    )
    linears = (gpu_shapes.Linear("a", 9, 64, 128), gpu_shapes.Linear("b", 4, 128, 64))
    convs = (gpu_shapes.Conv("c", 8, 64, 64), gpu_shapes.Conv("d", 8, 64, 128, stride=2))
    for name, value in {"LINEARS": linears, "CONVS": convs, "GRID_WIDTH": 64, "GRID_HEADS": 4, "GRID_BATCH": 1}.items():
        monkeypatch.setattr(gpu_timing, name, value)
    return gpu_timing


@pytest.mark.parametrize(("section", "records"), [("linears", 6), ("convs", 6), ("grid", 12)])
def test_micro_benchmarks_from_end_to_end(on_cpu, section, records):
    done = list(getattr(on_cpu, section)({"triton"}))
    assert len(done) == records
    for record in done:
        assert {"dense"} < set(record["times"])
        assert all("us" in result for result in record["times"].values()), record
    if section == "grid":
        assert {(r["patch"], r["mlp ratio"]) for r in done} == {(p, m) for p in (1, 2, 4) for m in (1, 2, 4, 8)}
        assert set(done[0]["kernels"]) == {"qkv", "proj", "fc1", "fc2"}
    else:
        assert {r["batch"] for r in done} == {1, 16, 64}
        assert "no CUDA device" in done[0]["not run"]["cuda"]


def test_tiles_are_timed_each_by_itself(on_cpu, monkeypatch):
    from sparsedm_compile.kernels.cuda import kernel as cuda
    from sparsedm_compile.kernels.cuda.launch import Chip

    launched = set()
    monkeypatch.setattr(on_cpu, "LINEARS", on_cpu.LINEARS[:1] * 19)
    monkeypatch.setattr(cuda, "chip", lambda device: Chip("sm_90a", 132, 227 << 10))
    monkeypatch.setattr(cuda, "launch", lambda program, *_: launched.add(program))
    monkeypatch.setattr(cuda, "_unavailable", lambda: None)
    cuda._plan.cache_clear()
    records = list(on_cpu.tiles(set()))
    cuda._plan.cache_clear()
    assert len(records) == 9
    assert all(set(r["times"]) == {on_cpu._name(t) for t in TILES} and r["chosen"] in r["times"] for r in records)
    assert len(launched) == len(TILES)


@pytest.fixture
def end_to_end(monkeypatch):
    """The models section on the CPU, in fp32, with Inductor's dense and the backend's kernels both run eagerly."""
    import gpu_timing

    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(torch.nn.Module, "bfloat16", lambda self: self)
    monkeypatch.setattr(gpu_timing, "_on_gpu", lambda inputs: inputs)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda model, backend=None, mode=None: model)
    monkeypatch.setattr(
        gpu_timing, "paired_times", lambda runs, **_: {n: [r() is None or 0.5] * 3 for n, r in runs.items()}
    )
    seen = []

    def explain(model, *inputs, **kwargs):
        seen.append(gpu_timing.choice.kernel_names())
        return SimpleNamespace(layers=[SimpleNamespace(kernel="dense")])

    monkeypatch.setattr(importlib.import_module("sparsedm_compile.explain"), "explain", explain)
    return gpu_timing, seen


def test_models_are_timed_without_the_kernels_that_were_wrong(end_to_end, monkeypatch):
    from gpu_runner import Clock

    gpu_timing, seen = end_to_end
    models = {"small": ("digits", None, 2), "absent": ("diffusers:NoSuchModel", None, 2)}
    monkeypatch.setattr(gpu_timing, "MODELS", models)
    monkeypatch.setattr(gpu_timing, "PATTERNS", ("2:4", "2:4v2"))
    records = list(gpu_timing.models(Clock(1000), {"triton"}))
    assert [(r["model"], r["pattern"]) for r in records] == [
        ("small", "2:4"),
        ("small", "2:4v2"),
        ("absent", "2:4"),
        ("absent", "2:4v2"),
    ]
    assert records[0]["ok"] is True
    assert records[0]["gain"] == 1
    assert "NoSuchModel" in records[2]["why"] or "diffusers" in records[2]["why"]
    assert len(seen) == 2
    assert all("triton" not in names and "cuda" in names for names in seen)
    records = list(gpu_timing.models(Clock(20), set()))
    assert [r["why"] for r in records] == ["20 s were left"] * 4


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Of SD 1.5's UNet and google/ddpm-cifar10-32, as published; of DiT-XL/2 in diffusers, where each block embeds time
    [("SD 1.5 UNet", 859_520_964), ("DDPM UNet", 35_746_307), ("DiT-XL/2", 749_826_464)],
)
def test_models_are_those_that_were_published(name, parameters):
    pytest.importorskip("diffusers")
    import gpu_timing

    from sparsedm_compile.model_spec import load_model

    source, config, batch = gpu_timing.MODELS[name]
    loaded = load_model(source, config=config, batch=batch, device="meta")
    assert sum(p.numel() for p in loaded.model.parameters()) == parameters


def test_the_summary_shows_failures_gains_and_gaps(gpu):
    from gpu_runner import Outcome

    timed = {"dense": {"gain": 1.0}, "cuda 2:4": {"gain": 1.5, "us": 3.0}, "triton 2:4v64": {"why": "no"}}
    outcomes = [
        Outcome("checks", 9, 1, None, [{"kernel": "a", "ok": True}, {"kernel": "a", "ok": False, "why": "NaN"}]),
        Outcome("sanitizer", 9, 0, "skipped: compute-sanitizer is not installed"),
        Outcome("linears", 9, 1, "its time was up", [{"layer": "q", "batch": 64, "times": timed}]),
        Outcome("tiles", 9, 1, None, [{"layer": "q", "batch": 1, "chosen": "64x64", "times": {"64x64": {"us": 5.0}}}]),
        Outcome("grid", 9, 1, None, [{"patch": 1, "mlp ratio": 4, "times": {"sparse": {"gain": 1.21}}}]),
        Outcome(
            "models",
            9,
            1,
            None,
            [
                {
                    "model": "m",
                    "pattern": "2:4",
                    "batch": 64,
                    "gain": 1.3,
                    "ms": {"dense": 1.0, "sparse": 0.7},
                    "ok": True,
                },
                {"model": "n", "pattern": "2:4", "why": "needs diffusers"},
                {
                    "model": "w",
                    "pattern": "2:4",
                    "batch": 1,
                    "gain": 9.0,
                    "ms": {},
                    "ok": False,
                    "relative error to masked dense": 0.3,
                },
            ],
        ),
    ]
    text = "\n".join(gpu.summary(outcomes))
    for expected in (
        "a: 1 right, 1 wrong",
        "WRONG",
        "skipped: compute-sanitizer is not installed",
        "its time was up",
        "cuda 2:4 over dense, geometric mean (range): batch 64: 1.50 (1.50-1.50)",
        "64x64 5.0 us; chosen 64x64",
        "geometric mean 1.210 (SparseDM 1.068)",
        "m 2:4 batch 64: 1.30x",
        "n 2:4: skipped, needs diffusers",
        "WRONG, relative error 3.0e-01",
    ):
        assert expected in text
    assert math.isnan(gpu.geometric_mean([]))
    assert gpu.geometric_mean([1, 4]) == pytest.approx(2)
