"""SR-STE: the decay that pulls masked weights towards zero, added to the gradients just before an optimizer step."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsedm_compile.distributed import sharded_mask
from sparsedm_compile.layers import SparseLayer, layer_pattern, sparse_layers
from sparsedm_compile.planning import unwrap


class SRSTE:
    """Adds ``decay * (1 - mask) * weight`` to the gradient of every masked weight, at each ``optimizer.step()``.

    The straight-through estimator alone lets masked weights drift, and masks flip back and forth; the decay shrinks
    what is masked and so settles the masks. It acts in a pre-step hook, hence after gradients were accumulated,
    averaged over workers, unscaled and clipped: inside ``backward`` it would be divided away by the loss scale of
    mixed precision. Optimizers that unscale in their own kernel (``fused=True``) announce the scale to the step; the
    term is scaled alike.

    It follows the layers' current patterns: after ``set_pattern`` the next step uses the new masks, and a layer at
    ``"dense"`` gets no decay. Weights without a gradient are left alone.

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        srste = SRSTE(optimizer, model)
        ...                                   # any loop that calls optimizer.step()
        srste.remove()

    Args:
        optimizer: trains at least the sparse layers of ``model``.
        model: a sparsified model.
        decay: the paper's lambda_W; 2e-4 there and in SparseDM's official code.

    Raises:
        ValueError: ``decay`` is negative or not finite; ``model`` has no sparse layers; ``optimizer`` lacks the weight
            of one of them.
        TypeError: an argument of the wrong type.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", arXiv 2102.04010,
    section 4.2.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, decay: float = 2e-4) -> None:
        if not 0 <= decay < float("inf"):
            raise ValueError(f"SRSTE: decay must be a finite number, 0 or more, got {decay}")
        layers = trained_layers(optimizer, model, "SRSTE")
        self.decay = decay
        self._layers = tuple(layers.values())
        self._hook = optimizer.register_step_pre_hook(self._add_decay)

    def remove(self) -> None:
        """Stop: later steps of the optimizer get no decay. Calling it twice is harmless."""
        self._hook.remove()

    @torch.no_grad()
    def _add_decay(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise ValueError(
                "SRSTE: optimizer.step(closure) computes its gradients after the decay was added; call backward() "
                "first and step() without a closure"
            )
        # A GradScaler sets this on optimizers that divide by the scale themselves; else gradients are unscaled by now.
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        done: set[int] = set()
        for layer in self._layers:
            weight, pattern = layer.weight, layer_pattern(layer)
            if pattern.is_dense or weight.grad is None or id(weight) in done:
                continue
            done.add(id(weight))  # a weight shared by two layers decays once
            factor = self.decay if scale is None else self.decay * scale.to(weight.device)
            weight.grad.add_(weight.masked_fill(sharded_mask(weight, pattern), 0) * factor)


def trained_layers(optimizer: Optimizer, model: nn.Module, caller: str) -> dict[str, SparseLayer]:
    """The sparse layers of ``model``, all of which ``optimizer`` must train, save for frozen ones.

    Raises:
        ValueError, TypeError: as :class:`SRSTE`; messages start with ``caller``.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{caller} takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
    layers = sparse_layers(unwrap(model))
    if not layers:
        raise ValueError(f"{caller}: model has no sparse layers: call sparsify(model, pattern) first")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [n for n, layer in layers.items() if layer.weight.requires_grad and id(layer.weight) not in trained]
    if missing:
        raise ValueError(
            f"{caller}: the optimizer does not hold the weights of {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''} ({len(missing)} of {len(layers)} sparse layers); build it from "
            "model.parameters() of this model, or set requires_grad=False on layers that are not trained"
        )
    return layers
