"""2:4 in int8 or fp8 through cuSPARSELt: half the bytes and twice the rate again, for operands rounded to 8 bits."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.kernels.cusparselt.kernel import CuSparseLtKernel, sparse_product
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.kernels.two_four.compress import masked_matrix


@dataclass(frozen=True)
class _Format:
    dtype: torch.dtype
    largest: float
    capability: tuple[int, int]


_FORMATS = {
    "cusparselt_int8": _Format(torch.int8, 127.0, (8, 0)),
    "cusparselt_fp8": _Format(torch.float8_e4m3fn, 448.0, (8, 9)),
}
# torch.sparse: cuSPARSELt takes 8-bit sparse matrices of multiples of 32, dense ones of 16.
_SPARSE, _TOKENS = 32, 16


class QuantizedKernel(CuSparseLtKernel):
    """As :class:`CuSparseLtKernel`, with weights and activations rounded to 8 bits.

    Scales are symmetric: one an output feature, fixed when the weight is packed, and one a token, found at every call.
    Products are summed in int32 or fp32 and come back so; scales and bias follow in fp32, in one rounding to the dtype
    of the layer. Rounding costs about 1% (int8) or 4% (fp8) of the output's norm for normally distributed operands, and
    more where a few activations are large, so no measurement ever chooses this kernel: ask for it by name, and look at
    the images.

    A packed weight is the library's compressed tensor in 8 bits and the ``(out,)`` float32 scales.
    """

    version = "1"
    exact = False

    def __init__(self, name: str) -> None:
        self.name = name
        self._format = _FORMATS[name]

    def refusal(self, spec: LayerSpec) -> str | None:
        refusal = super().refusal(spec)
        if refusal is not None:
            return refusal
        rows, width = spec.weight_shape[:2]
        if rows % _SPARSE or width % _SPARSE:
            return f"cuSPARSELt takes 8-bit weights of multiples of {_SPARSE}, not {rows} x {width}"
        capability, needed = torch.cuda.get_device_capability(), self._format.capability
        if capability < needed:
            return "{} needs compute capability {}.{}, this GPU has {}.{}".format(self.name, *needed, *capability)
        return None

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        matrix, _ = masked_matrix(weight, spec.pattern)
        rounded, scale = quantize(matrix, self._format.dtype)
        return torch._cslt_compress(rounded.contiguous()), scale.squeeze(1)

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        # Kept halves and two bits each: 10/16 of the 8-bit dense bytes.
        rows, width = spec.weight_shape[:2]
        values = torch.empty(rows, width * 10 // 16, dtype=self._format.dtype, device=device)
        return values, torch.empty(rows, dtype=torch.float32, device=device)

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        levels = super().unpack(values, index, spec).float()
        return (levels * index.reshape(-1, *[1] * (levels.dim() - 1))).to(spec.dtype)

    def _product(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        if not len(x):
            return x.new_empty(0, spec.weight_shape[0])
        rounded, scale = quantize(x, self._format.dtype)
        out = sparse_product(rounded, values, spec.weight_shape[0], None, _TOKENS)
        if out is None:
            return F.linear(x, self.unpack(values, index, spec).reshape(spec.weight_shape[:2]), bias)
        out = out.float() * scale * index
        return (out if bias is None else out + bias.float()).to(x.dtype)


def quantize(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits.

    Args:
        matrix: ``(rows, columns)``.
        dtype: ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        ``(rows, columns)`` in ``dtype`` and float32 ``(rows, 1)`` scales; their product is about ``matrix``. A row that
        is not finite has a scale that is not, so its products are not, either.
    """
    largest = next(f.largest for f in _FORMATS.values() if f.dtype == dtype)
    wide = matrix.float()
    scale = wide.abs().amax(dim=1, keepdim=True) / largest
    levels = wide / torch.where(scale > 0, scale, 1.0)
    if dtype == torch.int8:
        levels = levels.round()
    return levels.to(dtype), scale
