"""Layers that carry a pattern: plain subclasses of nn.Linear and nn.Conv1d to 3d, state_dict keys as they were."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sparsedm_compile.derived import Request, derived_weights
from sparsedm_compile.masked_weight import mask_out, masked_weight
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import named_modules


def effective_weight(weight: Tensor, pattern: str) -> Tensor:
    """The weight that a layer of this pattern computes with.

    While tracing and while training it is the operator ``sparsedm::masked_weight``; in eager inference it is the same
    masked tensor, kept until the weight changes, because a mask costs more than many of the products it serves.
    """
    if pattern == "dense":
        return weight
    recomputed = torch.compiler.is_compiling() or (torch.is_grad_enabled() and weight.requires_grad)
    if recomputed or not _is_plain(weight):
        return masked_weight(weight, pattern)
    ((masked,),) = derived_weights.get([Request(weight, ("masked", pattern), lambda w: (mask_out(w, pattern),))])
    return masked


def _is_plain(weight: Tensor) -> bool:
    """Whether the tensor has memory of its own to look at, and nobody traces what is done with it."""
    if type(weight) not in (nn.Parameter, Tensor) or weight.device.type == "meta":
        return False
    if torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(weight)


class _Sparse:
    """The pattern of a layer, as its spelling: Dynamo guards strings by value (see masked_weight.py)."""

    carries_pattern = True
    pattern: str = "dense"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if f"{prefix}weight_values" in state_dict:
            errors.append(
                f"{prefix}weight_values is a packed weight, but this layer is not packed: load the checkpoint into a "
                "model that pack(model) made of the same plan"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern!r}"


class SparseLinear(_Sparse, nn.Linear):
    """``nn.Linear`` whose weight is masked by ``pattern``. Made in place by :func:`sparsedm_compile.sparsify`."""

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)``."""
        return F.linear(input, effective_weight(self.weight, self.pattern), self.bias)


class _SparseConv(_Sparse):
    """A convolution whose weight is masked by ``pattern``. Made in place by :func:`sparsedm_compile.sparsify`."""

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C_in, *size) -> (B, C_out, *size')``."""
        return self._conv_forward(input, effective_weight(self.weight, self.pattern), self.bias)


class SparseConv1d(_SparseConv, nn.Conv1d):
    """``nn.Conv1d`` whose weight is masked by ``pattern``: ``(B, C_in, L) -> (B, C_out, L')``."""


class SparseConv2d(_SparseConv, nn.Conv2d):
    """``nn.Conv2d`` whose weight is masked by ``pattern``: ``(B, C_in, H, W) -> (B, C_out, H', W')``."""


class SparseConv3d(_SparseConv, nn.Conv3d):
    """``nn.Conv3d`` whose weight is masked by ``pattern``: ``(B, C_in, D, H, W) -> (B, C_out, D', H', W')``."""


SparseLayer = SparseLinear | SparseConv1d | SparseConv2d | SparseConv3d
SPARSE_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Name -> layer, for every layer of ``model`` that carries a pattern, in registration order."""
    return {name: module for name, module in named_modules(model) if isinstance(module, _Sparse)}


def layer_pattern(layer: nn.Module) -> Pattern:
    """The pattern that ``layer`` computes with; dense for a layer that carries none."""
    return Pattern.parse(getattr(layer, "pattern", "dense"))
