"""The exponential moving average of a model's weights, which is what a diffusion model is sampled with."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsedm_compile.planning import unwrap


class EMA:
    """A moving average of all parameters, started from the model's weights at construction.

    For a sparsified model these are its *dense* weights: the average is masked where it is used, as SparseDM's official
    code does. Averaging masked weights instead would blur every mask that changed on the way. Kept in float32 whatever
    the model's dtype, since a bfloat16 average would round away steps of ``1 - decay``.

    Args:
        model: its parameters at this moment are the start; where they are spread over processes (FSDP2), so is the
            average. Wrappers of ``torch.compile`` and DDP are looked through.
        decay: share of the average that an update keeps; 0.9999 in SparseDM and U-ViT.
        warmup: keep only ``min(decay, (1 + k) / (10 + k))`` at update ``k = 1, 2, ...``. Without it, the average of a
            run much shorter than ``1 / (1 - decay)`` steps stays at its start. The official runs, long as they are,
            have none.

    Raises:
        ValueError: not ``0 <= decay < 1``, or a model without parameters.
        TypeError: not a module.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"EMA takes a torch.nn.Module, got {type(model).__name__}")
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.restart(model)
        if not self.shadow:
            raise ValueError(f"EMA: {type(model).__name__} has no parameters to average")

    def restart(self, model: nn.Module) -> None:
        """Start again from the current weights of ``model``."""
        self.updates = 0
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in unwrap(model).named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights of ``model``; call it after each optimizer step.

        Raises:
            ValueError: ``model`` has other parameters than the one that the average was started from.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for average, parameter in self._pairs(model):
            average.lerp_(parameter.detach().to(average), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of ``model`` with the average, in the dtype of the model.

        Raises:
            ValueError: as :meth:`update`.
        """
        for average, parameter in self._pairs(model):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """The average, by name, and the number of updates; not the decay."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the average of a :meth:`state_dict`, of a model with the same parameters."""
        self.updates = state["updates"]
        for name, average in self.shadow.items():
            average.copy_(state["shadow"][name])

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = dict(unwrap(model).named_parameters())
        different = parameters.keys() ^ self.shadow.keys()
        different |= {n for n in parameters.keys() & self.shadow.keys() if parameters[n].shape != self.shadow[n].shape}
        if different:
            raise ValueError(
                f"EMA: the model's parameters are not those that the average was started from; {min(different)!r} "
                f"differs ({len(different)} in all)"
            )
        return [(self.shadow[name], parameter) for name, parameter in parameters.items()]
