"""2:4 linear layers and convolutions on sparse tensor cores, from one main loop."""

from functools import lru_cache

import torch
from torch import Tensor

from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels.cuda import build
from sparsedm_compile.kernels.cuda.launch import Boxed, Program, chip, launch
from sparsedm_compile.kernels.cuda.tiles import Tile, choose_tile
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.kernels.two_four.compress import carry_refusal, compress, expand, from_matrix
from sparsedm_compile.kernels.two_four.fragments import K_BLOCK, from_fragments, packed_shapes, to_fragments

# Numbered as in epilogue.cuh.
_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
_ALIGNED = 8  # 16-bit elements that one copy or store moves
_LARGEST_OFFSET = 8192  # positions in an image are 16-bit numbers in the kernel


class CudaKernel(Kernel):
    """bfloat16 and float16 on GPUs since Ampere; patterns that fit into 2:4; convolutions of one group, any window.

    ``wgmma.cu`` is for Hopper, ``mma.cu`` for the others and for small shapes.

    A convolution is an implicit product: patches are gathered from the NHWC image on their way into shared memory. With
    a window of one pixel and no stride the image is a matrix as it lies, and treated as one.

    Bias, activation and residual are applied in fp32 to the accumulators, rounded once.

    A packed weight is ``values`` and ``index`` of :mod:`sparsedm_compile.kernels.two_four.fragments`.
    """

    name = "cuda"
    version = "2"
    devices = ("cuda",)

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.device != "cuda":
            return f"the cuda kernel does not run on {spec.device}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"the cuda kernel takes bfloat16 and float16, not {dtype_name(spec.dtype)}"
        if spec.op == "conv3d":
            return "the cuda kernel takes convolutions of one and two dimensions, not three"
        dims = {"linear": 2, "conv2d": 4}[spec.op]
        if len(spec.weight_shape) != dims:
            return f"a {spec.op} weight has {dims} dimensions, not {len(spec.weight_shape)}"
        refusal = carry_refusal(spec.pattern, spec.weight_shape, spec.groups)
        if refusal is not None:
            return refusal
        if spec.groups != 1:
            return f"the cuda kernel takes convolutions of one group, not {spec.groups}"
        rows, width = spec.weight_shape[:2]
        if rows % _ALIGNED or width % _ALIGNED:
            return f"the cuda kernel takes widths that are multiples of {_ALIGNED}, not {rows} x {width}"
        if max(*spec.padding, *spec.dilation, *spec.stride, *spec.weight_shape[2:]) > 64:
            return "the cuda kernel takes windows, strides, paddings and dilations up to 64"
        return _unavailable()

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        return to_fragments(*compress(weight, spec.pattern))

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        values, index = packed_shapes(*_matrix_shape(spec))
        return (
            torch.empty(values, dtype=spec.dtype, device=device),
            torch.empty(index, dtype=torch.int32, device=device),
        )

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        return from_matrix(expand(*from_fragments(values, index, *_matrix_shape(spec))), spec.weight_shape)

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        rows, width = spec.weight_shape
        flat = _aligned(x.reshape(-1, width))
        out = x.new_empty(*x.shape[:-1], rows)
        residual = None if epilogue.residual is None else epilogue.residual.reshape(-1, rows)
        _run(flat, values, index, out, flat.shape[0], spec, epilogue, residual, (0, 0, 0, 0, 0))
        return out

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        batch, channels, height, width = x.shape
        if max(height, width) > _LARGEST_OFFSET:
            raise ValueError(
                f"the cuda kernel takes images up to {_LARGEST_OFFSET} pixels a side, not {height} x {width}"
            )
        nhwc = _aligned(x.permute(0, 2, 3, 1))
        sizes = tuple(
            (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1
            for size, padding, dilation, window, stride in zip(
                (height, width), spec.padding, spec.dilation, spec.weight_shape[2:], spec.stride, strict=True
            )
        )
        out = x.new_empty(batch, *sizes, spec.weight_shape[0])
        residual = None if epilogue.residual is None else epilogue.residual.permute(0, 2, 3, 1)
        tokens = batch * sizes[0] * sizes[1]
        _run(nhwc, values, index, out, tokens, spec, epilogue, residual, (height, width, channels, *sizes))
        out = out.permute(0, 3, 1, 2)
        # Dense conv2d answers in the input's own format.
        return out if x.is_contiguous(memory_format=torch.channels_last) else out.contiguous()


def program(spec: LayerSpec, tile: Tile, shared_limit: int) -> Program:
    """The variant of the kernel for a layer and a tile."""
    stages = tile.stages(shared_limit)
    defines = {
        "BFLOAT16": int(spec.dtype == torch.bfloat16),
        "TILE_M": tile.rows,
        "TILE_N": tile.tokens,
        "WARP_M": tile.warp_rows,
        "WARP_N": tile.warp_tokens,
        "STAGES": stages,
        "BLOCKS": tile.blocks,
        "CONVOLUTION": int(not _is_product(spec)),
    }
    if not _is_product(spec):
        pairs = {
            "WINDOW": spec.weight_shape[2:],
            "STRIDE": spec.stride,
            "PADDING": spec.padding,
            "DILATION": spec.dilation,
        }
        defines |= {f"{name}_{side}": n for name, pair in pairs.items() for side, n in zip("HW", pair, strict=True)}
    return Program(tile.source, tuple(defines.items()), tile.threads, tile.shared(stages))


@lru_cache(maxsize=4096)
def _plan(spec: LayerSpec, tokens: int, device: torch.device) -> tuple[Program, Tile]:
    gpu = chip(device)
    tile = choose_tile(spec.weight_shape[0], tokens, gpu.arch, gpu.multiprocessors, gpu.shared_limit)
    return program(spec, tile, gpu.shared_limit), tile


def _run(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    out: Tensor,
    tokens: int,
    spec: LayerSpec,
    epilogue: Epilogue,
    residual: Tensor | None,
    image: tuple[int, int, int, int, int],
) -> None:
    """Fill ``out (tokens, rows)``; ``image`` is (height, width, channels, out height, out width) of a convolution."""
    if not out.numel():
        return
    rows, width = _matrix_shape(spec)
    variant, tile = _plan(spec, tokens, x.device)
    bias = None if epilogue.bias is None else _aligned(epilogue.bias)
    residual = None if residual is None else _aligned(residual)
    by_engine = tile.source == "wgmma.cu" and _is_product(spec)
    operand = Boxed(x.reshape(tokens, width), tile.tokens) if by_engine else x
    tensors = [values, index, operand, bias, residual, out]
    numbers = [rows, tokens, _ACTIVATIONS[epilogue.activation], width, -(-width // K_BLOCK), *image]
    launch(variant, (-(-rows // tile.rows), -(-tokens // tile.tokens)), x.device, tensors, numbers)


def _is_product(spec: LayerSpec) -> bool:
    """Whether ``x`` is a matrix as it lies, also where it is an NHWC image."""
    return spec.op == "linear" or (spec.weight_shape[2:], spec.stride, spec.padding) == ((1, 1), (1, 1), (0, 0))


def _matrix_shape(spec: LayerSpec) -> tuple[int, int]:
    rows, width, *window = spec.weight_shape
    for size in window:
        width *= size
    return rows, width


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16-byte accesses can use; a view of another tensor may start anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"sparse tensor cores need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return build.unavailable()
