"""Which of several orders of the channels costs a pruned model least, measured on calibration data."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sparsedm_compile.budget.sensitivity import OutputError
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.permutation.channels import Axis, Coupled


class PrunedDamage:
    """What pruning every sparse layer by magnitude does to the output, with the channels in another order.

    Args:
        model: dense; never changed.
        tensors: its parameters and buffers, a tied one under each of its names.
        names: ``id`` of a tensor -> the first of its names, which axes go by.
        axes: all axes, in element order.
        patterns: first name of each weight that is masked -> its pattern.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Sequence[CalibrationBatch],
        tensors: Mapping[str, Tensor],
        names: Mapping[int, str],
        axes: Sequence[Axis],
        patterns: Mapping[str, Pattern],
    ) -> None:
        self._error = OutputError(model, calibration)
        self._tensors, self._names, self._axes, self._patterns = tensors, names, axes, patterns

    @torch.no_grad()
    def __call__(self, content: np.ndarray) -> float:
        """Mean squared change of the output; ``content`` holds for every element the one whose data lies there."""
        changed: dict[str, Tensor] = {}
        for axis in self._axes:
            order = content[axis.start : axis.start + axis.size] - axis.start
            if axis.tensor and (np.diff(order) != 1).any():
                tensor = changed.get(axis.tensor, self._tensors[axis.tensor])
                changed[axis.tensor] = tensor.index_select(axis.dim, torch.from_numpy(order).to(tensor.device))
        for name, pattern in self._patterns.items():
            changed[name] = mask_out(changed.get(name, self._tensors[name]), str(pattern))
        first = {name: self._names[id(tensor)] for name, tensor in self._tensors.items()}
        return self._error({name: changed[first[name]] for name in self._tensors if first[name] in changed})


def least_damage(
    candidates: Sequence[np.ndarray], coupled: Sequence[Coupled], damage: PrunedDamage
) -> tuple[np.ndarray, float, float]:
    """The best candidate, and from there for each set of coupled axes the best one, the order at hand among them.

    Single families would be finer, but a convolutional model has hundreds, and each trial is a pass over the data.

    Args:
        candidates: contents, each of which permutes every set of axes within itself.

    Returns:
        The content; the damage of the order at hand; the damage of the content, which is no larger.
    """
    candidates = [np.arange(len(candidates[0])), *candidates]
    damages = [damage(candidate) for candidate in candidates]
    least = min(damages)
    content = candidates[damages.index(least)]
    for component in coupled:
        elements = np.concatenate([np.arange(axis.start, axis.start + axis.size) for axis in component.axes])
        start = content
        for candidate in candidates:
            trial = start.copy()
            trial[elements] = candidate[elements]
            if np.array_equal(trial, start):
                continue
            if (found := damage(trial)) < least:
                content, least = trial, found
    return content, damages[0], least
