"""The masks of a training step in the code that Inductor writes for GPUs, generated without one and never run."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.utils import get_code

import sparsedm_compile as sdm
from sparsedm_compile.kernels.cusparselt.kernel import CuSparseLtKernel

triton = pytest.importorskip("triton")


@pytest.fixture
def gpu_code(monkeypatch):
    """Inductor's Triton code for the training graph of a module: for CPU tensors, but as for a Hopper GPU."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, is_active=lambda: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)  # set_active cannot be undone where there is none

    def generate(model, x, **options):
        with config.patch(cpu_backend="triton", fx_graph_cache=False):
            return "".join(get_code(torch.compile(model, backend="sparsedm", options=options), x))

    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield generate


# Where channels share a mask, their sums are a pass of their own.
@pytest.mark.parametrize(("pattern", "passes"), [("2:4", 1), ("2:4v2", 2)])
def test_a_mask_is_one_pass_over_its_weight(gpu_code, pattern, passes):
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    sdm.sparsify(model, pattern, policy="all")
    code = gpu_code(model, torch.randn(32, 128))
    launched = re.findall(r"^ +(triton_\w+?)_\d+\.run\(|(extern_kernels\.\w+)\(", code, re.MULTILINE)
    assert [kernel or product for kernel, product in launched] == [
        *["triton_poi_fused_masked_weight"] * passes,  # pointwise: weights in, masked weights out
        "extern_kernels.addmm",
        "triton_poi_fused_gelu",
        *["triton_poi_fused_masked_weight"] * passes,
        "extern_kernels.addmm",
    ]
    assert "torch.ops.sparsedm" not in code


def test_a_convolution_of_a_channels_last_model(gpu_code):
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1)).to(memory_format=torch.channels_last)
    sdm.sparsify(model, "2:4", policy="all")
    code = gpu_code(model, torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last))
    assert len(re.findall(r"triton_\w*masked_weight\w*\.run\(", code)) == 1
    assert "torch.ops.sparsedm" not in code


def test_a_forward_through_cusparselt_keeps_the_mask_one_pass(gpu_code, monkeypatch):
    monkeypatch.setattr(CuSparseLtKernel, "refusal", lambda self, spec: None)
    model = nn.Sequential(nn.Linear(128, 256, bias=False))
    sdm.sparsify(model, "2:4", policy="all")
    with torch.autocast("cpu", torch.bfloat16):
        code = gpu_code(model, torch.randn(32, 128), train_kernel="cusparselt")
    launched = re.findall(
        r"^ +(triton_\w+)_\d+\.run\(|^ +(?:buf\d+ = )?((?:torch|extern)[\w.]+)\(buf", code, re.MULTILINE
    )
    assert [kernel or product for kernel, product in launched] == [
        "triton_poi_fused__to_copy",  # x
        "triton_poi_fused__to_copy_masked_weight_two_four_linear",  # float32 weight in, masked bfloat16 weight out
        "torch.ops.sparsedm.two_four_linear.default",
    ]
