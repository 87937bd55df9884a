"""What the Triton kernels do without a GPU: pack, unpack, refuse, and stay out of the way."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.kernels import LayerSpec, get_kernel
from sparsedm_compile.kernels.choice import choose
from sparsedm_compile.kernels.triton import packed_kernel, runtime, vector_kernel
from sparsedm_compile.kernels.triton.tiles import packed_tiles, vector_tiles
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

VECTOR = LayerSpec("linear", (64, 64), Pattern(2, 4, 64), torch.bfloat16, "cuda")
PACKED = replace(VECTOR, pattern=Pattern(2, 4))
CONV = LayerSpec("conv2d", (64, 64, 3, 3), Pattern(2, 4, 64), torch.bfloat16, "cuda", (1, 1), (1, 1))


@pytest.fixture
def on_gpu_machine(monkeypatch):
    """A machine whose GPU takes everything, for refusals that are about the layer."""
    for module in (vector_kernel, packed_kernel):
        monkeypatch.setattr(module, "machine_refusal", lambda spec, dtypes: None)


@st.composite
def weights(draw, min_v: int):
    n, m = draw(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (1, 16), (5, 16), (1, 3), (2, 5), (1, 32)]))
    v = draw(st.sampled_from([v for v in (1, 2, 32, 64) if v >= min_v]))
    width = m * draw(st.integers(1, 40))
    window = draw(st.sampled_from([(), (1, 1)] + [(3, 3), (2, 3)] * (min_v > 1)))
    shape = (v * draw(st.integers(1, 3)), width, *window)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight, LayerSpec("conv2d" if window else "linear", shape, Pattern(n, m, v), dtype, "cuda")


def assert_exact(kernel: str, weight: torch.Tensor, spec: LayerSpec) -> None:
    values, index = get_kernel(kernel).pack(weight, spec)
    unpacked = get_kernel(kernel).unpack(values, index, spec)
    assert unpacked.dtype == weight.dtype
    assert torch.equal(unpacked, weight * magnitude_mask_naive(weight, spec.pattern))
    expected = get_kernel(kernel).empty_packed(spec, torch.device("meta"))
    for tensor, empty in zip((values, index), expected, strict=True):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (empty.shape, empty.dtype, empty.stride())


@settings(max_examples=40, deadline=None)
@given(weights(min_v=32))
def test_vector_packs_exactly(drawn):
    assert_exact("triton", *drawn)


@settings(max_examples=40, deadline=None)
@given(weights(min_v=1))
def test_packed_packs_exactly(drawn):
    assert_exact("triton_packed", *drawn)


def test_packed_bytes():
    """2:4 in bf16: 16 bits a value and 2 bits a position, so 36 bits for every 64."""
    values, index = get_kernel("triton_packed").empty_packed(replace(PACKED, weight_shape=(64, 1024)), "cpu")
    assert (values.nbytes + index.nbytes) / (64 * 1024 * 2) == 36 / 64


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(VECTOR, pattern=Pattern(1, 1)), "the pattern is dense"),
        (PACKED, "needs v >= 32"),
        (replace(VECTOR, pattern=Pattern(2, 4, 16)), "needs v >= 32"),
        (replace(VECTOR, pattern=Pattern(1, 32, 32)), "groups of 2, 4, 8 or 16 inputs, not 32"),
        (replace(VECTOR, pattern=Pattern(9, 16, 32)), "at most 8 inputs of a group, not 9"),
        (replace(VECTOR, weight_shape=(64, 60)), "input width 60 is not a multiple of 8"),
        (replace(VECTOR, weight_shape=(96, 64)), "output width 96 is not a multiple of v = 64"),
        (replace(CONV, groups=2), "one group, not 2"),
        (VECTOR, None),
        (CONV, None),
    ],
)
def test_vector_refusals(on_gpu_machine, spec, reason):
    refusal = get_kernel("triton").refusal(spec)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(PACKED, pattern=Pattern(1, 1)), "the pattern is dense"),
        (CONV, "1x1 convolutions of stride 1 only"),
        (replace(CONV, weight_shape=(64, 64, 1, 1)), "1x1 convolutions of stride 1 only"),  # padded
        (replace(PACKED, pattern=Pattern(7, 8)), "hardly smaller than dense"),
        (replace(PACKED, weight_shape=(64, 62)), "input width 62 is not a multiple of 4"),
        (replace(CONV, weight_shape=(64, 64, 1, 1), padding=(0, 0)), None),
        (PACKED, None),
        (replace(PACKED, weight_shape=(7, 12)), None),
    ],
)
def test_packed_refusals(on_gpu_machine, spec, reason):
    refusal = get_kernel("triton_packed").refusal(spec)
    assert refusal is None if reason is None else reason in refusal


@pytest.mark.parametrize("kernel", ["triton", "triton_packed"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "runs on CUDA devices, not on cpu"),
        ({"dtype": torch.float64}, "bfloat16, not float64|float32, not float64"),
        ({}, "no CUDA device is available"),
    ],
)
def test_refusals_of_the_machine(monkeypatch, kernel, changes, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime._cuda_refusal.cache_clear()
    refusal = get_kernel(kernel).refusal(replace(VECTOR, **changes))
    runtime._cuda_refusal.cache_clear()
    assert any(part in refusal for part in reason.split("|"))


@pytest.mark.parametrize(("capability", "accepted"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_old_gpus_are_refused(monkeypatch, capability, accepted):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    runtime._cuda_refusal.cache_clear()
    refusal = get_kernel("triton").refusal(VECTOR)
    runtime._cuda_refusal.cache_clear()
    assert refusal is None if accepted else "needs compute capability 8.0" in refusal


@pytest.mark.parametrize("kernel", ["triton", "triton_packed"])
def test_without_triton_the_refusal_says_so(monkeypatch, kernel):
    monkeypatch.setattr(runtime, "is_installed", lambda: False)
    assert "triton is not installed" in get_kernel(kernel).refusal(VECTOR)


def test_the_package_works_without_triton():
    program = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
import torch, sparsedm_compile
from sparsedm_compile.kernels import LayerSpec, get_kernel
from sparsedm_compile.pattern import Pattern
spec = LayerSpec("linear", (64, 64), Pattern(2, 4, 64), torch.float16, "cuda")
print(get_kernel("triton").refusal(spec))
get_kernel("triton").pack(torch.ones(64, 64).half(), spec)
"""
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "triton is not installed" in run.stdout


@pytest.mark.parametrize("kernel", ["triton", "triton_packed"])
def test_the_operators_refuse_cpu_tensors_in_words(kernel):
    pytest.importorskip("triton")
    pattern = "2:4v64"
    spec = replace(VECTOR, dtype=torch.float16, device="cpu")
    packed = get_kernel(kernel).pack(torch.randn(64, 64).half(), spec)
    with pytest.raises(ValueError, match=f"kernel '{kernel}' cannot take .* runs on CUDA devices, not on cpu"):
        torch.ops.sparsedm.linear(torch.ones(3, 64).half(), *packed, kernel, pattern, [64, 64])
    shape, constants = [64, 64, 1, 1], ([1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(ValueError, match=f"kernel '{kernel}' cannot take .* runs on CUDA devices, not on cpu"):
        torch.ops.sparsedm.conv(torch.ones(1, 64, 2, 2).half(), *packed, kernel, pattern, shape, *constants)


@pytest.mark.parametrize("kernel", ["triton", "triton_packed"])
def test_the_operators_trace_on_fake_cuda_tensors(kernel):
    """Inductor traces shapes, strides and devices for CUDA on any machine."""
    with FakeTensorMode():
        packed = get_kernel(kernel).empty_packed(VECTOR, torch.device("cuda"))
        x = torch.empty(2, 257, 64, dtype=torch.bfloat16, device="cuda")
        out = torch.ops.sparsedm.linear(x, *packed, kernel, "2:4v64", [64, 64])
        assert (out.shape, out.dtype, out.device.type) == ((2, 257, 64), torch.bfloat16, "cuda")
        image = torch.empty(2, 64, 8, 8, dtype=torch.bfloat16, device="cuda")
        constants = ([1, 1], [0, 0], [1, 1], 1)
        out = torch.ops.sparsedm.conv(image, *packed, kernel, "2:4v64", [64, 64, 1, 1], *constants)
        assert out.shape == image.shape


def test_cpu_users_do_not_read_about_triton():
    spec = LayerSpec("linear", (64, 64), Pattern(2, 4), torch.float64)  # no CPU kernel takes it
    verdict = choose(spec, torch.empty(8, 64, device="meta"), False)
    assert "cpu: " in verdict.reason
    assert "triton" not in verdict.reason


def test_devices_without_any_kernel_are_named():
    spec = LayerSpec("linear", (64, 64), Pattern(2, 4), torch.float32, "mps")
    assert choose(spec, torch.empty(8, 64, device="meta"), False).reason == "no kernel runs on mps"


@pytest.mark.parametrize("module", [vector_kernel, packed_kernel])
def test_the_autotuner_gets_the_tiles_of_the_device(monkeypatch, module):
    pytest.importorskip("triton")
    h200 = SimpleNamespace(major=9, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    tuner, constants = module._program()
    assert constants == {}
    tuner.nargs = {}
    launch = {
        "n": 2,
        "m": 4,
        "V": 64,
        "CONV": False,
        "N": 4096,
        "rows": 4096,
        "out_ptr": torch.empty(1, dtype=torch.bfloat16),
    }
    configs = tuner.prune_configs(launch | {"grid": None, "warmup": False})
    tiles = [(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.kwargs["BLOCK_K"]) for c in configs]
    assert len(configs) > 1
    assert (128, 256, 64) in tiles or (32, 64, 128) in tiles


@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("pattern", ["1:2v32", "2:4v32", "2:4v64", "1:4v256", "8:16v32", "1:16v64"])
def test_vector_tiles_fit(major, pattern):
    p, limit = Pattern.parse(pattern), 99 << 10
    for conv in (True, False):
        for tile in vector_tiles(major, limit, p, 640, conv):
            assert tile.depth // p.m * (p.n & -p.n) >= 16  # depth of a tensor-core product
            assert tile.channels % min(p.v, 64) == 0
            assert tile.rows >= 64


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 4096])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:32", "2:5"])
def test_packed_tiles_fit(rows, pattern):
    for tile in packed_tiles(99 << 10, Pattern.parse(pattern), rows, 4):
        assert 16 <= tile.rows <= 64
        assert tile.depth >= 128  # whole words of positions for any pattern
