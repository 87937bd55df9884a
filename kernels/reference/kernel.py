"""The reference kernel: unpack, then dense. It skips nothing; it exists to be right, everywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec, convolve
from sparsedm_compile.masks import magnitude_mask


def apply_epilogue(product: Tensor, epilogue: Epilogue) -> Tensor:
    """``activation(product) + residual``; the bias is already in the product."""
    match epilogue.activation:
        case "none":
            out = product
        case "gelu":
            out = F.gelu(product)
        case "gelu_tanh":
            out = F.gelu(product, approximate="tanh")
        case "silu":
            out = F.silu(product)
        case "geglu":
            value, gate = product.chunk(2, dim=-1)
            out = value * F.gelu(gate)
        case other:
            raise ValueError(f"unknown activation {other!r}: one of none, gelu, gelu_tanh, silu, geglu")
    return out if epilogue.residual is None else out + epilogue.residual


class ReferenceKernel(Kernel):
    """Plain torch, every dtype and device. Its packed form is also the portable one that checkpoints hold.

    ``values (out, in / m * n, *kernel)`` in the weight's dtype, kept weights in order; ``index (out / v, in / m * n,
    *kernel)`` uint8, the position of each inside its group.
    """

    name = "reference"
    version = "1"
    skips_zeros = False

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.pattern.is_dense:
            return "the pattern is dense"
        return spec.pattern.refusal(spec.weight_shape, spec.groups)

    def gates(self, spec: LayerSpec) -> bool:
        return spec.op == "linear" and spec.weight_shape[0] % 2 == 0

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        p = spec.pattern
        out_features, in_features, *kernel = weight.shape
        keep = magnitude_mask(weight, p).reshape(out_features // p.v, p.v, in_features // p.m, p.m, *kernel)[:, 0]
        # A stable sort of "dropped" puts the kept positions first, in order.
        index = keep.logical_not().to(torch.uint8).argsort(dim=2, stable=True)[:, :, : p.n]
        grouped = weight.reshape(out_features, in_features // p.m, p.m, *kernel)
        values = grouped.gather(2, index.repeat_interleave(p.v, dim=0))
        kept = in_features // p.m * p.n
        return (
            values.reshape(out_features, kept, *kernel),
            index.to(torch.uint8).reshape(out_features // p.v, kept, *kernel),
        )

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        p = spec.pattern
        out_features, in_features, *kernel = spec.weight_shape
        kept = in_features // p.m * p.n
        return (
            torch.empty(out_features, kept, *kernel, dtype=spec.dtype, device=device),
            torch.empty(out_features // p.v, kept, *kernel, dtype=torch.uint8, device=device),
        )

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        p = spec.pattern
        out_features, in_features, *kernel = spec.weight_shape
        groups = in_features // p.m
        weight = values.new_zeros(out_features, groups, p.m, *kernel)
        position = index.repeat_interleave(p.v, dim=0).reshape(out_features, groups, p.n, *kernel)
        weight.scatter_(2, position.long(), values.reshape(out_features, groups, p.n, *kernel))
        return weight.reshape(spec.weight_shape)

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        product = F.linear(x, self.unpack(values, index, spec), epilogue.bias)
        return apply_epilogue(product, epilogue).contiguous()

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        weight = self.unpack(values, index, spec)
        return apply_epilogue(convolve(x, weight, epilogue.bias, spec), epilogue)
