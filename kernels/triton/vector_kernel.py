"""Vector-wise N:M linear layers and convolutions on dense tensor cores, by Triton."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsedm_compile.kernels.reference.kernel import ReferenceKernel
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.kernels.triton.runtime import (
    ACTIVATIONS,
    aligned,
    check_operands,
    machine_refusal,
    on_device_of,
    require,
)
from sparsedm_compile.kernels.triton.tiles import Tile, vector_tiles
from sparsedm_compile.kernels.triton.tuning import tuned
from sparsedm_compile.pattern import Pattern

_PORTABLE = ReferenceKernel()
_MIN_V = 32
_MAX_N = 8
_GROUPS = (2, 4, 8, 16)  # a 32-bit word, or one, two, four 64-bit words of 16-bit inputs


class TritonVectorKernel(Kernel):
    """fp16 and bf16, ``v`` of at least 32: the multiplications that the mask saves are not done, on any tensor core.

    Packed: ``values (out / v, kh * kw, in / m, n, v)`` in the weight's dtype; ``index (out / v, kh * kw, n, in / m)``
    int32, the position of each kept input in bits from the start of its group. Why: ``vector.py``.

    The first call of a shape compiles and times a few tiles (``tiles.py``), so run a layer once before capturing it in
    a CUDA graph; Triton keeps binaries and timings on disk. Later calls neither synchronise nor allocate anything but
    the output and, for convolutions in NCHW, the copy of x in NHWC.
    """

    name = "triton"
    version = "1"
    devices = ("cuda",)

    def refusal(self, spec: LayerSpec) -> str | None:
        p = spec.pattern
        if p.is_dense:
            return "the pattern is dense"
        if p.v < _MIN_V:
            return f"needs v >= {_MIN_V}, channels that share a mask and make a tensor-core product; {p} has {p.v}"
        if p.m not in _GROUPS:
            return f"takes groups of 2, 4, 8 or 16 inputs, not {p.m}"
        if p.n > _MAX_N:
            return f"keeps at most {_MAX_N} inputs of a group, not {p.n}"
        if spec.op == "conv3d":
            return "takes convolutions of one and two dimensions, not three"
        if spec.groups != 1:
            return f"takes convolutions of one group, not {spec.groups}"
        if spec.weight_shape[1] % 8:
            return f"input width {spec.weight_shape[1]} is not a multiple of 8: 16-byte copies would be misaligned"
        return p.refusal(spec.weight_shape) or machine_refusal(spec, (torch.float16, torch.bfloat16))

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        blocks, taps, n, groups, v = _sizes(spec)
        values, position = _PORTABLE.pack(weight, spec)
        values = values.reshape(blocks, v, groups, n, taps).permute(0, 4, 2, 3, 1)
        shift = position.reshape(blocks, groups, n, taps).permute(0, 3, 2, 1).int() * 16
        # Not contiguous(): it leaves odd strides on dimensions of size one, and a graph is compiled for strides.
        return _contiguous(values), _contiguous(shift)

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        blocks, taps, n, groups, v = _sizes(spec)
        return (
            torch.empty(blocks, taps, groups, n, v, dtype=spec.dtype, device=device),
            torch.empty(blocks, taps, n, groups, dtype=torch.int32, device=device),
        )

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        blocks, _, n, groups, v = _sizes(spec)
        window = spec.weight_shape[2:]
        values = values.permute(0, 4, 2, 3, 1).reshape(blocks * v, groups * n, *window)
        position = (index // 16).to(torch.uint8).permute(0, 3, 2, 1).reshape(blocks, groups * n, *window)
        return _PORTABLE.unpack(values, position, spec)

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """See :meth:`Kernel.linear`.

        Raises:
            ValueError: the kernel refuses this layer here, or an operand has another shape or dtype than the spec says.
        """
        require(self, spec)
        out_features, in_features = spec.weight_shape
        out = x.new_empty(*x.shape[:-1], out_features)
        check_operands(spec, x, -1, epilogue, out)
        residual = None if epilogue.residual is None else epilogue.residual.contiguous()
        layout = {"out_image": 0, "out_pixel": out_features, "out_channel": 1}
        _launch(x.reshape(-1, in_features).contiguous(), values, index, spec, epilogue, residual, out, layout)
        return out

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        """See :meth:`Kernel.conv`. NHWC (channels_last) runs as it is; NCHW costs a copy of x.

        Raises:
            ValueError: the kernel refuses this layer here, or an operand has another shape or dtype than the spec says.
        """
        require(self, spec)
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        memory_format = torch.channels_last if nhwc else torch.contiguous_format
        size = [
            (x.shape[axis + 2] + 2 * pad - dilation * (window - 1) - 1) // stride + 1
            for axis, (pad, dilation, window, stride) in enumerate(
                zip(spec.padding, spec.dilation, spec.weight_shape[2:], spec.stride, strict=True)
            )
        ]
        out = torch.empty(
            (x.shape[0], spec.weight_shape[0], *size), dtype=x.dtype, device=x.device, memory_format=memory_format
        )
        check_operands(spec, x, 1, epilogue, out)
        residual = None if epilogue.residual is None else epilogue.residual.contiguous(memory_format=memory_format)
        pixels = x.permute(0, 2, 3, 1).contiguous()
        channels, plane = spec.weight_shape[0], size[0] * size[1]
        layout = {
            "out_image": channels * plane,
            "out_pixel": channels if nhwc else 1,
            "out_channel": 1 if nhwc else plane,
        }
        pointwise = spec.weight_shape[2:] == (1, 1) and spec.stride == (1, 1) and spec.padding == (0, 0)
        if pointwise and nhwc:
            pixels = pixels.reshape(-1, spec.weight_shape[1])
        _launch(pixels, values, index, spec, epilogue, residual, out, layout)
        return out


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _sizes(spec: LayerSpec) -> tuple[int, int, int, int, int]:
    out_features, in_features, *window = spec.weight_shape
    p = spec.pattern
    taps = window[0] * window[1] if window else 1
    return out_features // p.v, taps, p.n, in_features // p.m, p.v


def _launch(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    spec: LayerSpec,
    epilogue: Epilogue,
    residual: Tensor | None,
    out: Tensor,
    layout: dict[str, int],
) -> None:
    """Run on ``x (rows, K)``, or ``(B, H, W, K)`` where the window must be walked."""
    if not out.numel():
        return
    out_features, in_features = spec.weight_shape[:2]
    rows = out.numel() // out_features
    conv = x.dim() == 4
    height, width = x.shape[1:3] if conv else (1, 1)
    out_height, out_width = out.shape[2:] if conv else (1, rows)
    window = spec.weight_shape[2:] if conv else (1, 1)
    arguments = {
        "x_ptr": aligned(x).view(torch.int32 if spec.pattern.m == 2 else torch.int64),
        "values_ptr": values,
        "shift_ptr": index,
        "bias_ptr": values if epilogue.bias is None else epilogue.bias,
        "residual_ptr": out if residual is None else residual,
        "out_ptr": out,
        "rows": rows,
        "N": out_features,
        "K8": in_features // 8,
        **layout,
        "HEIGHT": height,
        "WIDTH": width,
        "OUT_WIDTH": out_width,
        "PIXELS": out_height * out_width,
        "bucket": 1 << (rows - 1).bit_length(),
        "n": spec.pattern.n,
        "m": spec.pattern.m,
        "V": spec.pattern.v,
        "KERNEL_H": window[0],
        "KERNEL_W": window[1],
        "STRIDE_H": spec.stride[0],
        "STRIDE_W": spec.stride[1],
        "PAD_H": spec.padding[0],
        "PAD_W": spec.padding[1],
        "DILATION_H": spec.dilation[0],
        "DILATION_W": spec.dilation[1],
        "CONV": conv,
        "ACTIVATION": ACTIVATIONS[epilogue.activation],
        "HAS_BIAS": epilogue.bias is not None,
        "HAS_RESIDUAL": residual is not None,
    }
    run, tile = _program()
    with on_device_of(x):
        run[lambda tile: _grid(tile, rows, out_features)](**arguments, **tile)


def _grid(tile: dict[str, Any], rows: int, out_features: int) -> tuple[int]:
    strip = min(tile["V"], 64)
    strips, strips_a_tile = out_features // strip, tile["BLOCK_N"] // strip
    return (-(-rows // tile["BLOCK_M"]) * -(-strips // strips_a_tile),)


@cache
def _program() -> tuple[Any, dict[str, int]]:
    from sparsedm_compile.kernels.triton.vector import vector_kernel

    key = [
        "bucket",
        "N",
        "K8",
        "n",
        "m",
        "V",
        "KERNEL_H",
        "KERNEL_W",
        "STRIDE_H",
        "STRIDE_W",
        "CONV",
        "out_channel",
    ]
    return tuned(vector_kernel, key, _tiles, Tile(16, 64, 64, 4, 1))


def _tiles(arguments: dict[str, Any], device: Any) -> list[Tile]:
    pattern = Pattern(arguments["n"], arguments["m"], arguments["V"])
    shared_bytes = device.shared_memory_per_block_optin
    return vector_tiles(device.major, shared_bytes, pattern, arguments["N"], arguments["CONV"])
