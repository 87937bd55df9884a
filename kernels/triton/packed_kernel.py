"""Packed N:M linear layers for few rows, by Triton."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.kernels.reference.kernel import ReferenceKernel
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.kernels.triton.runtime import (
    ACTIVATIONS,
    check_operands,
    machine_refusal,
    on_device_of,
    require,
)
from sparsedm_compile.kernels.triton.tiles import Tile, packed_tiles, position_bits
from sparsedm_compile.kernels.triton.tuning import tuned
from sparsedm_compile.pattern import Pattern

_PORTABLE = ReferenceKernel()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TritonPackedKernel(Kernel):
    """Any n:m and v that saves memory: the weight is read packed, so a layer of few rows takes about n / m of the time.

    Meant for the embeddings and modulations of diffusion models (one row an image) and for batch-1 layers; right for
    any number of rows, but it multiplies zeros, so with many rows others win. A 1x1 convolution is a linear layer over
    its pixels.

    Packed, with ``g = in / m`` rounded up to whole words: ``values (out, n, g)`` in the weight's dtype; ``index (out /
    v, n, g * bits / 32)`` int32, the position of each kept input in its group in 1, 2, 4 or 8 bits, the first lowest.

    The first call of a shape compiles and times a few tiles (``tiles.py``), so run a layer once before capturing it in
    a CUDA graph.
    """

    name = "triton_packed"
    version = "1"
    devices = ("cuda",)

    def refusal(self, spec: LayerSpec) -> str | None:
        p = spec.pattern
        if p.is_dense:
            return "the pattern is dense"
        plain = (*spec.weight_shape[2:], *spec.stride, *spec.padding, spec.groups) == (1, 1, 1, 1, 0, 0, 1)
        if spec.op != "linear" and not plain:
            return "takes linear layers and 1x1 convolutions of stride 1 only"
        # Unpacking costs instructions: an eighth less to read is not worth them.
        width = spec.dtype.itemsize * 8
        if p.n * (width + position_bits(p) / p.v) > p.m * width * 7 / 8:
            return f"{p} packed is hardly smaller than dense"
        return p.refusal(spec.weight_shape) or machine_refusal(spec, _DTYPES)

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        p = spec.pattern
        out_features, groups, stored = _sizes(spec)
        values, position = _PORTABLE.pack(weight, spec)
        values = values.reshape(out_features, groups, p.n).transpose(1, 2)
        position = position.reshape(-1, groups, p.n).transpose(1, 2).long()
        # Not contiguous(): it leaves odd strides on dimensions of size one, and a graph is compiled for strides.
        values = F.pad(values, (0, stored - groups)).clone(memory_format=torch.contiguous_format)
        position = F.pad(position, (0, stored - groups)).unflatten(2, (-1, 32 // position_bits(p)))
        words = (position << _shifts(p, weight.device)).sum(3)
        signed = words.where(words < 2**31, words - 2**32).int()  # the same 32 bits
        return values, signed.clone(memory_format=torch.contiguous_format)

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        p = spec.pattern
        out_features, _, stored = _sizes(spec)
        return (
            torch.empty(out_features, p.n, stored, dtype=spec.dtype, device=device),
            torch.empty(out_features // p.v, p.n, stored * position_bits(p) // 32, dtype=torch.int32, device=device),
        )

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        p = spec.pattern
        _, groups, _ = _sizes(spec)
        position = index.unsqueeze(3) >> _shifts(p, index.device) & (2 ** position_bits(p) - 1)
        position = position.flatten(2)[:, :, :groups].transpose(1, 2).flatten(1)
        values = values[:, :, :groups].transpose(1, 2).flatten(1)
        window = spec.weight_shape[2:]
        shaped = values.reshape(*values.shape, *window), position.to(torch.uint8).reshape(*position.shape, *window)
        return _PORTABLE.unpack(*shaped, spec)

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """See :meth:`Kernel.linear`.

        Raises:
            ValueError: the kernel refuses this layer here, or an operand has another shape or dtype than the spec says.
        """
        require(self, spec)
        out_features, in_features = spec.weight_shape[:2]
        out = x.new_empty(*x.shape[:-1], out_features)
        check_operands(spec, x, -1, epilogue, out)
        if not out.numel():
            return out
        p, residual = spec.pattern, epilogue.residual
        rows = out.numel() // out_features
        arguments = {
            "x_ptr": x.reshape(-1, in_features).contiguous(),
            "values_ptr": values,
            "index_ptr": index,
            "bias_ptr": values if epilogue.bias is None else epilogue.bias,
            "residual_ptr": out if residual is None else residual.contiguous(),
            "out_ptr": out,
            "rows": rows,
            "N": out_features,
            "K": in_features,
            "GROUPS8": values.shape[2] // 8,
            "bucket": 1 << (rows - 1).bit_length(),
            "n": p.n,
            "m": p.m,
            "M_PADDED": 1 << (p.m - 1).bit_length(),
            "V": p.v,
            "BITS": position_bits(p),
            "ACTIVATION": ACTIVATIONS[epilogue.activation],
            "HAS_BIAS": epilogue.bias is not None,
            "HAS_RESIDUAL": residual is not None,
        }
        run, tile = _program()
        with on_device_of(x):
            run[lambda meta: (-(-out_features // meta["BLOCK_N"]), -(-rows // meta["BLOCK_M"]))](**arguments, **tile)
        return out

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """See :meth:`Kernel.conv` and :meth:`linear`."""
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        residual = epilogue.residual
        over_pixels = Epilogue(
            epilogue.bias, epilogue.activation, None if residual is None else residual.permute(0, 2, 3, 1)
        )
        out = self.linear(x.permute(0, 2, 3, 1), values, index, spec, over_pixels).permute(0, 3, 1, 2)
        return out if nhwc else out.contiguous()


def _shifts(pattern: Pattern, device: torch.device) -> Tensor:
    return torch.arange(0, 32, position_bits(pattern), device=device)


def _sizes(spec: LayerSpec) -> tuple[int, int, int]:
    """Output features, groups of a row, and groups that are stored: whole words and whole 16-byte copies of values."""
    groups = spec.weight_shape[1] // spec.pattern.m
    whole = max(8, 32 // position_bits(spec.pattern))
    return spec.weight_shape[0], groups, -(-groups // whole) * whole


@cache
def _program() -> tuple[Any, dict[str, int]]:
    from sparsedm_compile.kernels.triton.packed import packed_kernel

    return tuned(packed_kernel, ["bucket", "N", "K", "n", "m", "V"], _tiles, Tile(16, 32, 128, 4, 1))


def _tiles(arguments: dict[str, Any], device: Any) -> list[Tile]:
    pattern = Pattern(arguments["n"], arguments["m"], arguments["V"])
    item_bytes = arguments["out_ptr"].element_size()
    return packed_tiles(device.shared_memory_per_block_optin, pattern, arguments["rows"], item_bytes)
