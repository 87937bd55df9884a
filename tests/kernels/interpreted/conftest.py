"""Runs only where Triton interprets: ``test_triton_interpreted.py`` starts a process for it."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masks import magnitude_mask_naive

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

_ACTIVATIONS = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
# Rounding the result to fp16 alone is 2e-4 of its norm; in float32 what is left is the order of summation.
_TOLERANCE = {torch.float16: 5e-4, torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="session", autouse=True)
def _poisoned_outputs():
    """An element that a kernel forgets to write is NaN, not the right value of an earlier run."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def truth():
    """The masked layer in float64, by torch."""

    def compute(x: Tensor, weight: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        masked = (weight * magnitude_mask_naive(weight, spec.pattern)).double()
        bias = None if epilogue.bias is None else epilogue.bias.double()
        if spec.op == "linear":
            z = F.linear(x.double(), masked, bias)
        else:
            z = F.conv2d(x.double(), masked, bias, spec.stride, spec.padding, spec.dilation, spec.groups)
        out = _ACTIVATIONS[epilogue.activation](z)
        return out if epilogue.residual is None else out + epilogue.residual.double()

    return compute


@pytest.fixture(scope="session")
def assert_true(truth):
    """Assert that ``out`` is the layer's output to the accuracy of its dtype; NaN never passes."""

    def check(out: Tensor, x: Tensor, weight: Tensor, spec: LayerSpec, epilogue: Epilogue = Epilogue()) -> None:  # noqa: B008
        expected = truth(x, weight, spec, epilogue)
        assert out.shape == expected.shape
        error = (out.double() - expected).norm() / expected.norm()
        assert error <= _TOLERANCE[out.dtype], f"relative error {error:.2e}"

    return check
