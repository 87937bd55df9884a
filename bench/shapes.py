"""The layer shapes of the models on the list, found by running each model on shapes alone.

    python bench/shapes.py [--only flux]

prints them with the number of layers of each model that have this shape.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from model_list import MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.macs import count_macs
from sparsedm_compile.model_spec import LoadedModel
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import make_plan


@dataclass(frozen=True)
class LayerShape:
    """A layer and the input that one image gives it.

    Attributes:
        op: ``"linear"`` or ``"conv2d"``.
        weight_shape: ``(N, K)`` or ``(C_out, C_in, kh, kw)``.
        size: ``(tokens,)`` or ``(H, W)`` of the input.
        stride, padding, dilation: of a convolution.
    """

    op: str
    weight_shape: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """``"linear 512->1536 @257"`` or ``"conv 3x3/2 320->320 @64x64"``."""
        out, width, *window = self.weight_shape
        what = " " + "x".join(map(str, window)) if window else ""
        step = f"/{self.stride[0]}" if self.stride != (1, 1) else ""
        return f"{self.op.removesuffix('2d')}{what}{step} {width}->{out} @{'x'.join(map(str, self.size))}"

    def spec(self, pattern: str, dtype: torch.dtype = torch.float32) -> LayerSpec:
        """The layer at a pattern, as kernels want it."""
        conv = (self.stride, self.padding, self.dilation)
        return LayerSpec(self.op, self.weight_shape, Pattern.parse(pattern), dtype, "cpu", *conv)

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """Of ``batch`` images: ``(batch * tokens, K)`` or ``(batch, C_in, H, W)``."""
        if self.op == "linear":
            return batch * self.size[0], self.weight_shape[1]
        return batch, self.weight_shape[1], *self.size

    @property
    def macs(self) -> int:
        """Of one image, zeros included."""
        if self.op == "linear":
            return self.size[0] * math.prod(self.weight_shape)
        steps = zip(self.size, self.weight_shape[2:], self.stride, self.padding, self.dilation, strict=True)
        out = [
            (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
            for size, window, stride, padding, dilation in steps
        ]
        return math.prod(out) * math.prod(self.weight_shape)


def layer_shapes(loaded: LoadedModel) -> Counter[LayerShape]:
    """Shape -> number of layers, of those that policy ``"default"`` makes sparse at 2:4; the model may be on meta.

    First, last, embedding and grouped layers are not among them, as they stay dense.
    """
    layers = dict(loaded.model.named_modules())
    wanted = {layers[name]: name for name in make_plan(loaded.model, "2:4").patterns()}
    found: Counter[LayerShape] = Counter()
    with _inputs_of(wanted, found):
        count_macs(loaded.model, *loaded.inputs, **loaded.kwargs)
    return found


@contextmanager
def _inputs_of(wanted: Mapping[nn.Module, str], found: Counter[LayerShape]) -> Iterator[None]:
    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in wanted:
            return
        x: Tensor = args[0]
        weight = tuple(module.weight.shape)
        if isinstance(module, nn.Linear):
            found[LayerShape("linear", weight, (x[..., 0].numel(),))] += 1
        else:
            found[LayerShape("conv2d", weight, tuple(x.shape[2:]), module.stride, module.padding, module.dilation)] += 1

    # On all modules, as hooks on these would change the model.
    handle = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        yield
    finally:
        handle.remove()


def all_shapes(only: str = "") -> dict[LayerShape, dict[str, int]]:
    """Every shape of the models whose title holds ``only``, with title -> number of layers; seconds for all of them."""
    shapes: dict[LayerShape, dict[str, int]] = {}
    for title, source in MODELS.items():
        if only.lower() in title.lower():
            for shape, count in layer_shapes(source.load(device="meta")).items():
                shapes.setdefault(shape, {})[title] = count
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose title holds this")
    shapes = all_shapes(parser.parse_args().only)
    table = Table("layer", "GMACs", "layers", title=f"{len(shapes)} shapes")
    for shape, uses in shapes.items():
        table.add_row(
            shape.name, f"{shape.macs / 1e9:.2f}", ", ".join(f"{count} {title}" for title, count in uses.items())
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
