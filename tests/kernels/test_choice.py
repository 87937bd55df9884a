"""The measured choice: never slower than dense, never silent, never an error for a layer's sake."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedm_compile.kernels import LayerSpec, choice, get_kernel, kernel_names, ops
from sparsedm_compile.kernels.choice import choose
from sparsedm_compile.kernels.reference.kernel import ReferenceKernel
from sparsedm_compile.kernels.verdicts import VerdictStore
from sparsedm_compile.pattern import DENSE, Pattern

SPEC = LayerSpec("linear", (64, 64), Pattern(2, 4))
X = torch.empty(8, 64, device="meta")  # the values are never read

CONV1D = LayerSpec("conv2d", (8, 8, 1, 3), Pattern.parse("2:4"), padding=(0, 1))  # as kernels see it


@pytest.fixture
def fresh_store(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_store", VerdictStore())


@pytest.fixture
def clock(monkeypatch, fresh_store):
    """Replaces the stopwatch: seconds a kernel takes, by name; the candidates still run once each."""
    seconds, measured = {}, []

    def paired_times(candidates, **_):
        measured.append(sorted(candidates))
        for run in candidates.values():
            run()
        return {name: [seconds.get(name, 1.0)] * 3 for name in candidates}

    monkeypatch.setattr(choice, "paired_times", paired_times)
    seconds_and_log = (seconds, measured)
    return seconds_and_log


def needs(kernel: str, spec: LayerSpec = SPEC) -> None:
    refusal = get_kernel(kernel).refusal(spec)
    if refusal is not None:
        pytest.skip(f"{kernel}: {refusal}")


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"dense": 2.0, "onednn": 1.5, "cpu": 1.0}, "cpu"),
        ({"dense": 1.0, "onednn": 1.5, "cpu": 2.0}, "dense"),
        ({"dense": 2.0, "onednn": 1.0, "cpu": 1.5}, "onednn"),  # the fastest dense is the rival, not the slowest
        ({"dense": 1.0, "onednn": 1.0, "cpu": 1.0}, "dense"),  # a tie goes to dense
        ({"dense": 1.0, "onednn": 0.999, "cpu": 2.0}, "dense"),  # so does a gain within the noise
    ],
)
def test_the_fastest_wins(clock, times, winner):
    needs("cpu")
    seconds, _ = clock
    seconds.update(times)
    verdict = choose(SPEC, X, True)
    assert verdict.kernel == winner
    assert verdict.sparse_seconds == times["cpu"]
    assert verdict.dense_seconds == pytest.approx(min(times["dense"], times["onednn"]), rel=0.01)
    assert verdict.native_seconds == times["dense"]
    assert verdict.ratio == pytest.approx(verdict.dense_seconds / verdict.sparse_seconds)
    assert "x the fastest dense" in verdict.reason


def test_the_reference_kernel_is_no_candidate(clock):
    seconds, measured = clock
    seconds["reference"] = 0.0
    assert choose(SPEC, X, True).kernel != "reference"
    assert all("reference" not in names for names in measured)


def test_measures_once_for_each_layer_and_input(clock):
    _, measured = clock
    for _ in range(3):
        choose(SPEC, X, True)
    assert len(measured) == 1
    choose(SPEC, X, False)  # another epilogue
    choose(SPEC, torch.empty(64, 64, device="meta"), True)  # another batch
    choose(LayerSpec("linear", (64, 64), Pattern(1, 4)), X, True)
    assert len(measured) == 4


NEAR = pytest.mark.parametrize(
    ("spec", "first", "near", "far"),
    [
        (SPEC, (2, 512, 64), [(1024, 64), (1, 1448, 64), (3, 250, 64)], [(1, 1449, 64), (1, 724, 64), (64,)]),
        (
            LayerSpec("conv2d", (32, 32, 3, 3), Pattern(2, 4), padding=(1, 1)),
            (4, 32, 16, 16),
            [(3, 32, 18, 14), (5, 32, 16, 20), (4, 32, 22, 12)],
            # As many pixels in narrow rows are another thing: 0.1x of dense where square images gave 1.6x.
            [(4, 32, 32, 32), (2, 32, 16, 16), (16, 32, 8, 8), (4, 32, 32, 8), (4, 32, 256, 1)],
        ),
        (
            LayerSpec("conv2d", (32, 32, 1, 3), Pattern(2, 4), padding=(0, 1)),  # of conv1d
            (2, 32, 64),
            [(2, 32, 80)],
            [(2, 32, 128)],
        ),
    ],
    ids=["linear", "conv2d", "conv1d"],
)


@pytest.mark.parametrize("sparse", [0.5, 2.0])
@NEAR
def test_a_clear_verdict_serves_near_sizes(clock, spec, first, near, far, sparse):
    seconds, measured = clock
    needs("cpu", spec)
    seconds["cpu"] = sparse
    verdict = choose(spec, torch.empty(first, device="meta"), True)
    for shape in near:
        again = choose(spec, torch.empty(shape, device="meta"), True)
        assert again == verdict  # which names the size that was measured
    assert len(measured) == 1
    for count, shape in enumerate(far, start=2):
        assert choose(spec, torch.empty(shape, device="meta"), True).measured_at != verdict.measured_at
        assert len(measured) == count


@pytest.mark.parametrize("sparse", [0.8, 1.0, 1.3])
@NEAR
def test_a_close_call_is_measured_at_each_size(clock, spec, first, near, far, sparse):
    seconds, measured = clock
    needs("cpu", spec)
    seconds["cpu"] = sparse
    choose(spec, torch.empty(first, device="meta"), True)
    for count, shape in enumerate(near[1:], start=2):
        verdict = choose(spec, torch.empty(shape, device="meta"), True)
        assert len(measured) == count
        seconds["cpu"] = 9.0  # what is known here is not asked again, though the near size now says otherwise
        assert choose(spec, torch.empty(shape, device="meta"), True) == verdict
        seconds["cpu"] = sparse


def test_remembers_across_processes(clock, monkeypatch):
    _, measured = clock
    first = choose(SPEC, X, True)
    monkeypatch.setattr(choice, "_store", VerdictStore())
    assert choose(SPEC, X, True) == first
    assert len(measured) == 1


def test_another_kernel_version_is_measured_anew(clock, monkeypatch):
    needs("cpu")
    _, measured = clock
    choose(SPEC, X, True)
    monkeypatch.setattr(type(get_kernel("cpu")), "version", "another")
    choose(SPEC, X, True)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (SPEC, (64,)),
        (SPEC, (5, 64)),
        (SPEC, (3, 7, 64)),
        (SPEC, (0, 64)),
        (LayerSpec("linear", (48, 48), Pattern(2, 4)), (48,)),  # a width that is no power of two
        (LayerSpec("conv2d", (32, 32, 3, 3), Pattern(2, 4), padding=(1, 1)), (3, 32, 5, 5)),
    ],
    ids=str,
)
def test_any_input_can_be_measured(clock, spec, shape):
    assert choose(spec, torch.empty(shape, device="meta"), True).kernel in ("dense", *kernel_names())


def test_dense_layers_choose_among_dense_kernels(clock):
    seconds, measured = clock
    seconds.update({"dense": 1.0, "onednn": 0.5, "cpu": 0.1})
    verdict = choose(LayerSpec("linear", (64, 64), DENSE), X, True)
    assert "cpu" not in measured[0]
    assert verdict.kernel == "onednn"
    assert verdict.sparse_seconds is None


def test_forced_kernels_are_not_measured(clock):
    needs("cpu")
    _, measured = clock
    for name in ("cpu", "reference", "onednn", "dense"):
        verdict = choose(SPEC, X, True, forced=name)
        assert verdict.kernel == name
        assert repr(name) in verdict.reason
    assert measured == []


def test_a_forced_kernel_that_cannot_falls_back_to_dense_and_says_so(caplog):
    spec = LayerSpec("linear", (64, 64), Pattern(2, 4), torch.float64)
    with caplog.at_level(logging.WARNING):
        verdict = choose(spec, X, True, forced="cpu")
    assert verdict.kernel == "dense"
    assert "'cpu' cannot take it" in verdict.reason
    assert "float32" in verdict.reason
    assert "dense instead" in caplog.text


def test_dtypes_without_a_sparse_kernel_name_it(clock):
    verdict = choose(LayerSpec("linear", (64, 64), Pattern(2, 4), torch.float64), X.double(), True)
    assert verdict.kernel == "dense"
    assert "cpu" in verdict.reason
    assert "float64" in verdict.reason


def test_an_unusual_layer_is_dense_whatever_was_forced():
    assert choose(SPEC, X, True, forced="cpu", unusual="odd padding").kernel == "dense"
    assert choose(SPEC, X, True, unusual="odd padding").reason == "odd padding"


def test_an_unknown_forced_kernel_is_an_error():
    with pytest.raises(ValueError, match=r"unknown kernel 'warp'.*cpu"):
        choose(SPEC, X, True, forced="warp")


def test_a_real_measurement(fresh_store):
    verdict = choose(SPEC, X, True)
    assert verdict.dense_seconds > 0
    if get_kernel("cpu").refusal(SPEC) is None:
        assert verdict.sparse_seconds > 0
        assert verdict.ratio > 0


class _Calls(TorchDispatchMode):
    """The operators that were called, each with the dimensions of its first input."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparsedm":
            self.seen.add((func._schema.name, args[0].dim()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spec", "x", "called"),
    [
        (SPEC, X, ("sparsedm::linear", 2)),
        (CONV1D, torch.randn(2, 8, 6), ("sparsedm::conv", 3)),
        (CONV1D, torch.randn(2, 8, 1, 6), ("sparsedm::conv", 4)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_times_what_a_compiled_model_calls(fresh_store, spec, x, called):
    """Their cost is 10 to 20 us a call, more than that of the arithmetic of a small layer."""
    if (refusal := get_kernel("cpu").refusal(spec)) is not None:
        pytest.skip(refusal)
    with _Calls() as calls:
        choose(spec, x, True)
    assert calls.seen == {called}


@pytest.fixture
def on_cuda(monkeypatch, fresh_store):
    """A GPU that runs "cuda" and "triton" on the CPU; returns the rounds that were timed and the graphs captured."""
    timed, captured = [], []

    def paired_times(candidates, *, synchronize=None, **_):
        timed.append((sorted(candidates), synchronize))
        for run in candidates.values():
            run()
        return {name: [{"dense": 20.0}.get(name, 10.0)] * 3 for name in candidates}

    def capture(run, calls):
        captured.append(calls)
        return lambda: None

    class OnCpu(ReferenceKernel):
        devices = ("cuda",)
        skips_zeros = True

        def refusal(self, spec):
            return None

    kernels = {"cuda": OnCpu(), "triton": OnCpu()}
    monkeypatch.setattr(choice, "kernel_names", lambda: list(kernels))
    for module in (choice, ops):
        monkeypatch.setattr(module, "get_kernel", kernels.__getitem__)
    monkeypatch.setattr(choice, "paired_times", paired_times)
    monkeypatch.setattr(choice, "capture", capture)
    monkeypatch.setattr(torch, "randn", lambda *size, generator, device: torch.zeros(size))
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    return timed, captured, kernels


CUDA = replace(SPEC, device="cuda")


def test_calls_on_a_gpu_are_timed_in_a_row_and_waited_for(on_cuda):
    timed, captured, _ = on_cuda
    verdict = choose(CUDA, X, True)
    assert timed == [(["cuda", "dense", "triton"], torch.cuda.synchronize)]
    assert captured == []
    assert (verdict.kernel, verdict.sparse_seconds, verdict.dense_seconds, verdict.ratio) == ("cuda", 1.0, 2.0, 2.0)


def test_layers_of_a_cuda_graph_are_timed_in_one(on_cuda):
    timed, captured, _ = on_cuda
    choose(CUDA, X, True)
    choose(CUDA, X, True, graphs=True)  # measured anew
    choose(CUDA, X, True, graphs=True)
    assert captured == [10, 10, 10]
    assert len(timed) == 2


def test_a_kernel_that_cannot_be_captured_is_not_used(on_cuda, monkeypatch, caplog):
    timed, _, kernels = on_cuda

    def linear(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(kernels["cuda"], "linear", linear)
    assert choose(CUDA, X, True, graphs=True).kernel == "triton"
    assert timed == [(["dense", "triton"], torch.cuda.synchronize)]
    assert "kernel 'cuda' fails here and is not used: operation not permitted" in caplog.text


def test_nothing_is_remembered_where_nothing_can_be_measured(on_cuda, monkeypatch):
    def capture(run, calls):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(choice, "capture", capture)
    verdict = choose(CUDA, X, True, graphs=True)
    assert (verdict.kernel, verdict.settled) == ("dense", False)
    assert "not even dense" in verdict.reason
