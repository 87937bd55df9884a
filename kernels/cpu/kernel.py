"""N:M linear layers and convolutions on CPUs: C++ that multiplies what is kept and skips the rest."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels.cpu import build
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Output channels go through the C++ in units of so many (kUnit), and a unit of values meets a unit of gates.
_UNIT = 128


class CpuKernel(Kernel):
    """float32, bfloat16, float16; any n:m and v; convolutions without groups; AVX-512, AVX2 and NEON from one source.

    In every dtype sums, bias, activation and residual are float32, and the output is rounded once, to nearest even. On
    processors with ``avx512_bf16``, bfloat16 goes through its instruction, which takes subnormal numbers for zero.

    A packed weight is ``values`` (in the layer's dtype) and ``index`` (int16, byte offsets into a panel of
    activations), both flat; ``layout.h`` says where each weight lies. The layout belongs to the vector width of this
    machine: keep masked dense weights for other machines.

    Every method but ``refusal`` expects a spec that ``refusal`` accepts.
    """

    name = "cpu"
    version = build.source_digest()
    devices = ("cpu",)

    def refusal(self, spec: LayerSpec) -> str | None:
        """See :meth:`Kernel.refusal`. The first spec that could be taken compiles the C++ (seconds, then cached)."""
        if spec.device != "cpu":
            return f"the cpu kernel does not run on {spec.device}"
        if spec.dtype not in _DTYPES:
            return f"the cpu kernel takes float32, bfloat16 and float16, not {dtype_name(spec.dtype)}"
        if spec.pattern.is_dense:
            return "the pattern is dense"
        if spec.groups != 1:
            return f"the cpu kernel takes convolutions of one group, not {spec.groups}"
        dims = {"linear": 2, "conv2d": 4, "conv3d": 5}[spec.op]
        if len(spec.weight_shape) != dims:
            return f"a {spec.op} weight has {dims} dimensions, not {len(spec.weight_shape)}"
        return spec.pattern.refusal(spec.weight_shape) or build.load()

    def gates(self, spec: LayerSpec) -> bool:
        """See :meth:`Kernel.gates`. The product is then never written at its full width, nor read again."""
        return spec.op == "linear" and spec.weight_shape[0] % (2 * _UNIT) == 0

    def operator(self, spec: LayerSpec) -> tuple[Callable, tuple]:
        """See :meth:`Kernel.operator`: ``sparsedm_cpu::linear`` and ``conv``.

        In a graph they replace ``sparsedm::linear`` and ``conv``, whose Python takes some 10 us where it is in the
        caches, and more than that between layers of megabytes.
        """
        constants = (spec.weight_shape, *_numbers(spec))
        if spec.op == "linear":
            return torch.ops.sparsedm_cpu.linear.default, constants
        return torch.ops.sparsedm_cpu.conv.default, (*constants, spec.stride, spec.padding, spec.dilation)

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Kernel.pack`; one pass, on all threads.

        Raises:
            ValueError: the weight holds NaN.
        """
        return torch.ops.sparsedm_cpu.pack(weight.detach(), *_numbers(spec), *_reach(spec))

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        """See :meth:`Kernel.empty_packed`."""
        values, index = torch.ops.sparsedm_cpu.packed_sizes(
            spec.weight_shape, *_numbers(spec), *_reach(spec), spec.dtype
        )
        return (
            torch.empty(values, dtype=spec.dtype, device=device),
            torch.empty(index, dtype=torch.int16, device=device),
        )

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        """See :meth:`Kernel.unpack`."""
        return torch.ops.sparsedm_cpu.unpack(values, index, spec.weight_shape, *_numbers(spec), *_reach(spec))

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """See :meth:`Kernel.linear`.

        Raises:
            ValueError: x, the packed weight, bias or residual has another shape or dtype than the spec says.
        """
        return self._run(x, values, index, spec, epilogue)

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """See :meth:`Kernel.conv`.

        Raises:
            ValueError: x, the packed weight, bias or residual has another shape or dtype than the spec says.
        """
        return self._run(x, values, index, spec, epilogue)

    def _run(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        operator, constants = self.operator(spec)
        return operator(x, values, index, *constants, epilogue.bias, epilogue.activation, epilogue.residual)


def _numbers(spec: LayerSpec) -> tuple[int, int, int]:
    return spec.pattern.n, spec.pattern.m, spec.pattern.v


def _reach(spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stride and dilation, on which a packed convolution depends: taps that read neighbouring rows share them."""
    return ((), ()) if spec.op == "linear" else (spec.stride, spec.dilation)
