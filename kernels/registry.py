"""What a kernel is: a way to pack a masked weight and to run a layer from the packed form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from sparsedm_compile.pattern import Pattern

#: "geglu": ``first half * gelu(second half)`` of the output channels (Shazeer, GLU Variants Improve Transformer, 2020)
Activation = Literal["none", "gelu", "gelu_tanh", "silu", "geglu"]


@dataclass(frozen=True)
class LayerSpec:
    """The constants of one layer: what a kernel must know to take it, pack it and run it.

    A conv1d is a conv2d of height 1 to every kernel: see :func:`with_height`.

    Attributes:
        weight_shape: ``(out, in)`` for linear, ``(C_out, C_in / groups, *kernel)`` for convolutions.
        dtype: of weight and activation.
        device: type of the device, ``"cpu"`` or ``"cuda"``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, one int a dimension; unused by linear.
    """

    op: Literal["linear", "conv2d", "conv3d"]
    weight_shape: tuple[int, ...]
    pattern: Pattern
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


def with_height(
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The same constants, those of a conv1d as of the conv2d of height 1 that it is."""
    ones, zeros = ((1,), (0,)) if len(weight_shape) == 3 else ((), ())
    return (*weight_shape[:2], *ones, *weight_shape[2:]), (*ones, *stride), (*zeros, *padding), (*ones, *dilation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """Torch's own convolution, in the memory format of x."""
    window = (spec.stride, spec.padding, spec.dilation, spec.groups)
    if spec.op == "conv2d":
        return F.conv2d(x, weight, bias, *window)
    # F.conv3d answers contiguous where its input is so small that it does not use oneDNN.
    return F.conv3d(x, weight, bias, *window).contiguous(memory_format=suggest_memory_format(x))


@dataclass(frozen=True)
class Epilogue:
    """What follows the product, in this order: ``activation(x @ w.T + bias) + residual``.

    Attributes:
        bias: ``(out,)`` or None.
        activation: ``"geglu"`` makes the output half as wide, and is for a kernel that ``gates`` the layer.
        residual: the shape of the output, or None.
    """

    bias: Tensor | None = None
    activation: Activation = "none"
    residual: Tensor | None = None


class Kernel(ABC):
    """One way to run N:M layers. Stateless; the packed weight is two tensors that callers keep.

    A packed weight is ``(values, index)``: any two tensors that the kernel's own ``linear`` / ``conv`` / ``unpack``
    understand, of shapes and dtypes that depend on the spec alone (never on the weight's values), so that layers of
    equal spec can share one compiled graph.
    """

    name: str
    #: changes whenever timings or packed layouts may change; remembered choices are keyed by it
    version: str
    #: False for dense kernels, which take part in the choice as rivals and run where they win
    skips_zeros: bool = True
    #: False where operands are rounded to fewer bits than the layer has: never chosen, only run by name
    exact: bool = True
    #: types of device that it is for; elsewhere the choice does not ask it
    devices: tuple[str, ...] = ("cpu", "cuda")
    #: whether an epilogue costs it less than a pass of its own over the output
    fuses: bool = True

    @abstractmethod
    def refusal(self, spec: LayerSpec) -> str | None:
        """Why this kernel cannot take the layer, or None if it can. Never raises, never compiles anything on meta."""

    def gates(self, spec: LayerSpec) -> bool:
        """Whether it takes the activation ``"geglu"`` for this layer."""
        return False

    def operator(self, spec: LayerSpec) -> tuple[Callable, tuple] | None:
        """An operator of the kernel's own, for graphs that need no gradient, and its constants.

        It is called as ``operator(x, values, index, *constants, bias, activation=..., residual=...)``, without
        ``activation`` and ``residual`` where there are none, and does what ``linear`` or ``conv`` does.
        """
        return None

    @abstractmethod
    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """Mask ``weight`` by :func:`sparsedm_compile.masks.magnitude_mask` and pack what is kept."""

    @abstractmethod
    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        """Uninitialised tensors with the shapes and dtypes that ``pack`` gives (for fake tensors and for loading)."""

    @abstractmethod
    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        """The masked dense weight, ``spec.weight_shape``, exactly as it was packed; rounded where not ``exact``."""

    @abstractmethod
    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """``x (..., in) -> (..., out)``, contiguous, for x of any strides."""

    @abstractmethod
    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """``x (B, C_in, *size) -> (B, C_out, *size')`` of 2 or 3 dimensions, in the memory format that dense gives."""
