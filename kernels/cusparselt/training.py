"""The operator ``sparsedm::two_four_linear``: a training forward through cuSPARSELt, a dense backward.

It takes the masked weight, not the weight. So the mask, and the cast under autocast, stay outside: Inductor fuses both
into one pass over the weight, where an operator would run ten, and ``sparsedm::masked_weight`` lets the gradient
straight through. Not measured on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsedm_compile.kernels.cusparselt.kernel import TOKENS, sparse_product

torch.library.define("sparsedm::two_four_linear", "(Tensor x, Tensor masked, Tensor? bias=None) -> Tensor")


def compress_and_multiply(x: Tensor, masked: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ masked.T + bias`` by cuSPARSELt; dense where none of its algorithms is right, as it then has warned.

    Args:
        x: ``(..., in)``, bfloat16 or float16.
        masked: ``(out, in)`` of the dtype of x, at most two of every four in a row nonzero: not checked, the library
            drops what is too much. Layers that ``CuSparseLtKernel.refusal`` accepts, masked, are so.
        bias: ``(out,)`` or None.

    Returns:
        ``(..., out)``, contiguous.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    out = None
    if len(rows):
        out = sparse_product(rows, torch._cslt_compress(masked.contiguous()), len(masked), bias, TOKENS)
    if out is None:
        out = F.linear(rows, masked, bias)
    return out.reshape(*x.shape[:-1], len(masked))


def _dense(x: Tensor, masked: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, masked, bias).contiguous()


torch.library.impl("sparsedm::two_four_linear", "CUDA", compress_and_multiply)
torch.library.impl("sparsedm::two_four_linear", "CompositeExplicitAutograd", _dense)  # every other device


@torch.library.register_fake("sparsedm::two_four_linear")
def _fake(x: Tensor, masked: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(
        x.shape[-1] == masked.shape[1],
        lambda: (
            f"sparsedm::two_four_linear: the last dimension of x is {x.shape[-1]}, the weight takes {masked.shape[1]}"
        ),
    )
    return x.new_empty(*x.shape[:-1], masked.shape[0])


def _save_for_backward(ctx, inputs, output) -> None:
    x, masked, bias = inputs
    ctx.has_bias = bias is not None
    # Not the compressed copy, of no use here: W is 2:4 along its rows, and grad @ W sums along its columns.
    ctx.save_for_backward(x, masked)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, masked = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]
    rows = grad.reshape(-1, masked.shape[0])
    return (
        grad @ masked if of_x else None,
        rows.t() @ x.reshape(-1, masked.shape[1]) if of_weight else None,
        rows.sum(0) if ctx.has_bias else None,
    )


torch.library.register_autograd("sparsedm::two_four_linear", _backward, setup_context=_save_for_backward)
