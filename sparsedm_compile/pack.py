"""``pack``: drop the dense weights of a sparsified model, for deployment."""

import math
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from sparsedm_compile.derived import derived_weights
from sparsedm_compile.explain import explain
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.layers import SPARSE_TYPES, SparseLayer, sparse_layers
from sparsedm_compile.packed_layers import PACKED_TYPES, packed_layers, spec_of
from sparsedm_compile.planning import unwrap
from sparsedm_compile.rendering import RichText
from sparsedm_compile.sparsify import check_weight

_DENSE_TYPES = {sparse: dense for dense, sparse in SPARSE_TYPES.items()}
# Without a measurement: convolutions narrower than this have been seen to lose on a CPU (0.65-0.8 of dense).
_NARROW = 32


@dataclass(frozen=True)
class PackedLayerReport:
    """One packed layer: its pattern, its kernel and the bytes of its weight before and after."""

    name: str
    pattern: str
    kernel: str
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class PackReport(RichText):
    """What :func:`pack` did; prints as a table."""

    layers: tuple[PackedLayerReport, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights before."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights, indices included."""
        return sum(layer.packed_bytes for layer in self.layers)

    def __rich__(self) -> Table:
        caption = f"{self.dense_bytes / 1e6:.2f} MB dense, {self.packed_bytes / 1e6:.2f} MB packed"
        table = Table("layer", "pattern", "kernel", "dense bytes", "packed bytes", title="packed", caption=caption)
        for layer in self.layers:
            row = (
                layer.name or "(model)",
                layer.pattern,
                layer.kernel,
                str(layer.dense_bytes),
                str(layer.packed_bytes),
            )
            table.add_row(*row)
        return table


def pack(model: nn.Module, *inputs: Any, **kwargs: Any) -> PackReport:
    """Replace the sparse layers of ``model`` by packed ones, in place: memory falls, training ends.

    Do it before ``torch.compile``. ``state_dict`` then holds the packed weights in a portable form, which loads into
    a model packed with the same plan on any machine; dense checkpoints are refused.

    Args:
        model: sparsified. Layers whose pattern is dense become plain layers again.
        inputs, kwargs: of one call; then the kernel of each layer is the one that :func:`explain` measured to be
            fastest, and layers that dense runs faster keep their masked weight unpacked. Without inputs every layer
            that a sparse kernel can take is packed, except narrow ones.

    Returns:
        Per layer, kernel and bytes.

    Raises:
        ValueError: the model is not sparse, is packed already, or lies on meta; weights that are not finite.
        TypeError: not a module; weights that are not float32, bfloat16 or float16.
        In every case the model is left as it was.
    """
    model = unwrap(model)
    layers = sparse_layers(model)
    if not layers:
        packed = "packed already" if packed_layers(model) else "not sparse: call sparsify(model, pattern) first"
        raise ValueError(f"{type(model).__name__} is {packed}")
    for name, layer in layers.items():
        check_weight(name, layer.weight)  # all of them first: the loop below must not fail half way
    measured = explain(model, *inputs, **kwargs) if inputs or kwargs else None
    chosen = {}
    for name, layer in layers.items():
        if layer.pattern != "dense":
            chosen[name] = _kernel(layer) if measured is None else _skipping(measured[name].kernel)

    reports = []
    for name, layer in layers.items():
        weight = layer.weight
        derived_weights.drop(weight)
        if layer.pattern == "dense":
            layer.__class__ = _DENSE_TYPES[type(layer)]
            del layer.pattern
            continue
        packed_type = PACKED_TYPES[_DENSE_TYPES[type(layer)]]
        del layer.weight
        layer.__class__ = packed_type
        layer.weight_shape = tuple(weight.shape)
        layer.preferred = chosen[name]
        why = measured[name].reason if measured else "not measured: pack(model, *inputs) would"
        layer.reason = f"packed; {why}"
        layer.adopt(weight.detach(), chosen[name])
        layer.requires_grad_(False).eval()
        size = sum(tensor.numel() * tensor.element_size() for tensor in (layer.packed_values, layer.packed_index))
        dense_size = math.prod(weight.shape) * weight.element_size()
        reports.append(PackedLayerReport(name, layer.pattern, layer.kernel, dense_size, size))
    model.eval()
    return PackReport(tuple(reports))


def _skipping(kernel: str) -> str:
    return kernel if kernel in kernel_names() and get_kernel(kernel).skips_zeros else "dense"


def _kernel(layer: SparseLayer) -> str:
    spec = spec_of(layer, layer.weight)
    if min(spec.weight_shape[:2]) < _NARROW:
        return "dense"
    able = (name for name in kernel_names() if get_kernel(name).skips_zeros and get_kernel(name).exact)
    return next((name for name in able if get_kernel(name).refusal(spec) is None), "dense")
