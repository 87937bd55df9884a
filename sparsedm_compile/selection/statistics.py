"""What calibration data tells of a layer: the Gram matrix of its inputs, gathered while the dense model runs."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.modes import evaluating
from sparsedm_compile.selection.matrix import input_rows

# Elements that are unfolded and cast to float64 at a time: 128 MB.
_CHUNK = 1 << 24


def input_grams(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], calibration: Sequence[CalibrationBatch]
) -> dict[str, Tensor]:
    """``X^T X`` over all rows X that each layer sees, from one run of ``model`` over ``calibration``.

    It is all that a choice of masks needs. Its diagonal holds the squared norms of the inputs, by which Wanda weighs;
    ``trace(D @ gram @ D.T)`` is the squared error of the outputs when the weight changes by D; and so it is the Hessian
    of that error, which SparseGPT and least squares ask for.

    Args:
        model: run as it stands.
        layers: name -> the modules that share one weight.

    Returns:
        Name -> float64 ``(groups, K, K)`` on the layer's device, K as in :func:`weight_matrices`.

    Raises:
        ValueError: a layer was not called, or saw inputs that are not finite.
    """
    # The products too in float64: compensated weights err where inputs hardly vary, and float32 would lose those
    # directions beside the large ones.
    return _sums(model, layers, calibration, lambda rows: rows.mT @ rows)


def mean_squares(
    model: nn.Module, layers: Mapping[str, Sequence[nn.Module]], calibration: Sequence[CalibrationBatch]
) -> dict[str, Tensor]:
    """The mean square of each input over all rows that a layer sees.

    Returns:
        Name -> float64 ``(groups, K)``.

    Args, Raises: as :func:`input_grams`.
    """

    def squares_and_count(rows: Tensor) -> Tensor:
        return torch.cat([rows.square().sum(1), rows.new_full((len(rows), 1), rows.shape[1])], dim=1)

    sums = _sums(model, layers, calibration, squares_and_count)
    return {name: squares[:, :-1] / squares[:, -1:] for name, squares in sums.items()}


@torch.no_grad()
def _sums(
    model: nn.Module,
    layers: Mapping[str, Sequence[nn.Module]],
    calibration: Sequence[CalibrationBatch],
    of_rows: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The sum of ``of_rows`` over all rows ``(groups, rows, K)`` that each layer sees."""
    device = next(iter(layers.values()))[0].weight.device
    sums: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name, modules in layers.items():
            for module in modules:
                hook = module.register_forward_pre_hook(_accumulate(sums, name, of_rows), with_kwargs=True)
                hooks.callback(hook.remove)
        for batch in calibration:
            model(*(tensor.to(device) for tensor in batch.inputs))
    for name in layers:
        if name not in sums:
            raise ValueError(
                f"layer {name!r} is not called by model(*inputs) on the calibration data, so nothing is known of its "
                f'inputs; leave it dense with rules={{"{name}": "dense"}}'
            )
        if not torch.isfinite(sums[name]).all():
            raise ValueError(f"layer {name!r} sees inputs that are not finite on the calibration data")
    return sums


def _accumulate(sums: dict[str, Tensor], name: str, of_rows: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        if isinstance(layer, _ConvNd):
            x = x.reshape(-1, *x.shape[1 - layer.weight.dim() :])  # it may come without a batch dimension
        unfolded = math.prod(x.shape[1:]) * math.prod(layer.weight.shape[2:])
        for part in x.split(max(1, _CHUNK // max(1, unfolded))):
            part_sum = of_rows(input_rows(layer, part.double()))
            sums[name] = sums[name].add_(part_sum) if name in sums else part_sum

    return hook


def output_error(grams: Tensor, weight: Tensor, other: Tensor) -> float:
    """``|X (weight - other)^T| / |X weight^T|`` in the Frobenius norm over all groups.

    Args:
        grams: ``(groups, K, K)``.
        weight, other: ``(groups, out / groups, K)``, float64.
    """
    difference = weight - other
    error = ((difference @ grams) * difference).sum().clamp_min(0)  # rounding may leave it a hair below 0
    signal = ((weight @ grams) * weight).sum().clamp_min(0)
    return 0.0 if error == 0 else (error / signal).sqrt().item()


@contextlib.contextmanager
def dense_and_still(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """``model`` in eval mode, uncompiled and with its ``layers`` dense; all is put back, also after an error."""
    patterns = {name: layer.pattern for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.pattern = "dense"
        # Hooks that are added after Dynamo compiled a part of the model would be passed by.
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for name, layer in layers.items():
            layer.pattern = patterns[name]
