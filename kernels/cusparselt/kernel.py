"""2:4 linear layers and 1x1 convolutions through cuSPARSELt, without a transpose on the way in or out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels.cusparselt.algorithms import NONE, Algorithms, Problem
from sparsedm_compile.kernels.reference.kernel import apply_epilogue
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.kernels.two_four.compress import carry_refusal, from_matrix, masked_matrix

# cuSPARSELt takes 16-bit dense matrices of multiples of 8; the sparse one must be of multiples of 16.
TOKENS = 8
_SPARSE = 16

_algorithms = Algorithms()


class CuSparseLtKernel(Kernel):
    """bfloat16 and float16 on GPUs since Ampere; patterns that fit into 2:4; linear and 1x1 convolutions.

    The product is ``out^T = W @ x^T``: the library takes ``x^T`` as a transposed view and writes ``out^T`` column by
    column, which is ``out`` row by row, so nothing is transposed. The bias is added inside, what follows outside.

    A packed weight is the library's own compressed tensor and an empty index.
    """

    name = "cusparselt"
    version = "1"
    devices = ("cuda",)
    fuses = False

    def refusal(self, spec: LayerSpec) -> str | None:
        if spec.device != "cuda":
            return f"cuSPARSELt does not run on {spec.device}"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return f"cuSPARSELt runs bfloat16 and float16 here, not {dtype_name(spec.dtype)}"
        refusal = carry_refusal(spec.pattern, spec.weight_shape, spec.groups)
        if refusal is not None:
            return refusal
        window = (*spec.weight_shape[2:], *spec.stride, *spec.padding, spec.groups)
        if spec.op != "linear" and window != (1, 1, 1, 1, 0, 0, 1):
            return "cuSPARSELt takes 1x1 convolutions of stride 1, without padding or groups"
        rows, width = spec.weight_shape[:2]
        if rows % _SPARSE or width % _SPARSE:
            return f"cuSPARSELt takes weights of multiples of {_SPARSE}, not {rows} x {width}"
        return _unavailable()

    def pack(self, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        matrix, _ = masked_matrix(weight, spec.pattern)
        # The library reads memory as it lies.
        return torch._cslt_compress(matrix.contiguous()), weight.new_empty(0, dtype=torch.uint8)

    def empty_packed(self, spec: LayerSpec, device: torch.device) -> tuple[Tensor, Tensor]:
        # Kept halves and two bits each: 9/16 of the dense bytes, in as many rows (torch's layout since 2.5).
        rows, width = spec.weight_shape[:2]
        values = torch.empty(rows, width * 9 // 16, dtype=spec.dtype, device=device)
        return values, torch.empty(0, dtype=torch.uint8, device=device)

    def unpack(self, values: Tensor, index: Tensor, spec: LayerSpec) -> Tensor:
        # The layout is the library's secret, but its product with the identity is exact: one term of each sum is not 0.
        rows, width = spec.weight_shape[:2]
        identity = torch.eye(width, device=values.device).to(values.dtype)
        # Transposed as in a forward, so that the algorithm is one that was checked in this very layout.
        product = sparse_product(identity, values, rows, None, TOKENS)
        if product is None:
            raise RuntimeError(
                f"cuSPARSELt gives no right result for {rows}x{width}x{width} {values.dtype} on this GPU; compile with "
                "kernel='dense' or 'cuda'"
            )
        return from_matrix(product.t().contiguous(), spec.weight_shape)

    def linear(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        product = self._product(rows, values, index, spec, epilogue.bias)
        product = product.reshape(*x.shape[:-1], spec.weight_shape[0])
        return apply_epilogue(product, epilogue)

    def conv(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
        nhwc = x.permute(0, 2, 3, 1)
        product = self._product(nhwc.reshape(-1, x.shape[1]).contiguous(), values, index, spec, epilogue.bias)
        product = product.reshape(*nhwc.shape[:3], spec.weight_shape[0]).permute(0, 3, 1, 2)
        if not x.is_contiguous(memory_format=torch.channels_last):
            product = product.contiguous()
        return apply_epilogue(product, epilogue)

    def _product(self, x: Tensor, values: Tensor, index: Tensor, spec: LayerSpec, bias: Tensor | None) -> Tensor:
        """``x (tokens, in) @ W.T + bias -> (tokens, out)``, contiguous."""
        if not len(x):
            return x.new_empty(0, spec.weight_shape[0])
        out = sparse_product(x, values, spec.weight_shape[0], bias, TOKENS)
        if out is None:
            weight = self.unpack(values, index, spec).reshape(spec.weight_shape[:2])
            return F.linear(x, weight, bias)
        return out


def sparse_product(
    x: Tensor, compressed: Tensor, out_features: int, bias: Tensor | None, multiple: int
) -> Tensor | None:
    """``x (tokens, in) @ W.T + bias -> (tokens, out)`` by the library, or None if it has no right algorithm.

    Args:
        x: contiguous, of the weight's dtype.
        multiple: of tokens that the library takes.

    Returns:
        In the dtype of x; 8-bit products in int32 or float32.
    """
    tokens, width = x.shape
    padded = -(-tokens // multiple) * multiple
    if padded != tokens:
        # What lies in the rows behind the last token is never read: each gives one row of the output, cut off below.
        buffer = x.new_empty(padded, width)
        buffer[:tokens] = x
        x = buffer
    problem = Problem(out_features, width, padded, x.dtype, bias is not None)
    algorithm = _algorithms.get(problem, x.device)
    if algorithm == NONE:
        return None
    out = torch._cslt_sparse_mm(
        compressed, x.t(), bias=bias, out_dtype=problem.out_dtype, transpose_result=True, alg_id=algorithm
    )
    return out[:tokens]


def _unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"cuSPARSELt needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None
