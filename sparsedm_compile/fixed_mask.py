"""A mask chosen once and kept, as NVIDIA's ASP trains: the baseline that SR-STE and SparseDM are measured against."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsedm_compile.distributed import sharded_mask
from sparsedm_compile.layers import layer_pattern
from sparsedm_compile.srste import trained_layers


class FixedMask:
    """Zeroes the masked weights now, and holds them at zero through every ``optimizer.step()``.

    The masks are those of the layers' patterns at construction, so a pruned weight never returns. Before a step their
    gradients are zeroed, which keeps them out of an optimizer's moments; after it the weights are, since momentum from
    before construction would move them. An average of the weights must be started after this, not before.

        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        fixed = FixedMask(optimizer, model)
        ...                                   # any loop that calls optimizer.step()
        fixed.remove()

    Args:
        optimizer: trains at least the sparse layers of ``model``.
        model: a sparsified model. Its dense weights are lost where the masks drop them.

    Raises:
        ValueError: ``model`` has no sparse layers, or all that train are dense; ``optimizer`` lacks the weight of one.
        TypeError: an argument of the wrong type.
        In every case the model is left as it was.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, section 4.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        layers = trained_layers(optimizer, model, "FixedMask")
        sparse = {
            name: layer
            for name, layer in layers.items()
            if layer.weight.requires_grad and not layer_pattern(layer).is_dense
        }
        if not sparse:
            raise ValueError("FixedMask: every trained layer is at 'dense'; set_pattern(model, '2:4') first")
        self._weights = {name: layer.weight for name, layer in sparse.items()}
        self._dropped = {name: ~sharded_mask(layer.weight, layer_pattern(layer)) for name, layer in sparse.items()}
        self._hold_weights()
        self._hooks = (
            optimizer.register_step_pre_hook(self._hold_gradients),
            optimizer.register_step_post_hook(self._hold_weights),
        )

    def remove(self) -> None:
        """Stop: later steps of the optimizer may move every weight. Calling it twice is harmless."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Name of the layer -> bool, the shape of its weight: what is dropped."""
        return dict(self._dropped)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold the weights that a :meth:`state_dict` drops, in place of those dropped now."""
        for name, dropped in self._dropped.items():
            dropped.copy_(state[name])
        self._hold_weights()

    @torch.no_grad()
    def _hold_gradients(self, *_: Any) -> None:
        for name, weight in self._weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(self._dropped[name], 0)

    @torch.no_grad()
    def _hold_weights(self, *_: Any) -> None:
        for name, weight in self._weights.items():
            weight.masked_fill_(self._dropped[name], 0)
