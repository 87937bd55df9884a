"""The entry: a mask for every sparse layer from calibration data, carried by the layer's weight."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.layers import layer_pattern, sparse_layers
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import unwrap
from sparsedm_compile.selection.matrix import weight_matrices, weight_of_matrices
from sparsedm_compile.selection.refit import least_squares
from sparsedm_compile.selection.report import LayerSelection, SelectionReport
from sparsedm_compile.selection.sparsegpt import inverse_factor, sparsegpt
from sparsedm_compile.selection.statistics import dense_and_still, input_grams, output_error
from sparsedm_compile.selection.wanda import wanda_score
from sparsedm_compile.sparsify import check_weight, get_plan

_log = logging.getLogger(__name__)
_METHODS = ("magnitude", "wanda", "sparsegpt")
# Gram matrices held at a time: one run over the calibration data serves as many layers as fit. One layer always does.
_GRAM_BYTES = 1 << 30


def select_masks(
    model: nn.Module,
    calibration: Iterable[CalibrationBatch],
    method: str = "sparsegpt",
    *,
    refit: bool = True,
    damping: float = 1e-3,
    progress: bool = True,
) -> SelectionReport:
    """Choose the mask of every sparse layer from what the layer sees on calibration data, in place.

    Masks are derived from the weights at each use, so the chosen one is carried by the weight: what it drops becomes
    zero, and the magnitude mask of the new weight is the chosen mask. Fine-tuning goes on from there.

        sdm.sparsify(model, "2:4")
        print(sdm.select_masks(model, sdm.calibration_set(loader)))

    Args:
        model: sparsified, its weights still dense: run this once, before any fine-tuning. Each layer's own pattern
            counts, so plans may mix them.
        calibration: what the model is called with; :func:`calibration_set` makes it.
        method: ``"magnitude"``; ``"wanda"``, magnitude times the norm of the input; ``"sparsegpt"``, second order,
            where weights further right make up for each dropped one.
        refit: give the kept weights the values that least squares finds best, whatever the method. Without it
            ``"magnitude"`` and ``"wanda"`` keep weights as they are, and ``"sparsegpt"`` is the paper's.
        damping: of the least squares: the pull towards the dense weight, relative to the mean squared norm of a
            layer's inputs. Less fits the calibration data closer: 1e-2, the papers' value, gave a loss of 0.0957 where
            1e-3 here alone gave 0.0932 and 1e-4 0.0930 (digits U-ViT, 1:4, 128 samples); fewer samples may want more.
        progress: show a progress bar over the layers.

    Returns:
        For each layer the relative error of its outputs, by magnitude and now.

    Raises:
        ValueError: an unknown method; no calibration data; a number out of range; the model is not sparse, or packed,
            or dense in every layer; a layer that the data does not reach; weights or inputs that are not finite, or
            new weights beyond the range of their dtype.
        TypeError: calibration that holds no :class:`CalibrationBatch`; not a module.
        In every case the model is left as it was.

    Source: Sun et al., arXiv 2306.11695 (Wanda); Frantar and Alistarh, arXiv 2301.00774 (SparseGPT).
    """
    # Layers see what the dense model feeds them, so one run of it serves many layers and their order does not matter.
    # Both papers recompute inputs from the pruned layers before, one run a layer; that measured no better here: digits
    # U-ViT, sparsegpt, denoising loss with dense and with pruned inputs, 2:4 0.0909 and 0.0908, 2:4v4 0.0979 and
    # 0.0967, 1:4 0.1320 and 0.1332; refitted, 2:4 0.0873 and 0.0873, 1:4 0.0954 and 0.0957.
    model, calibration = unwrap(model), list(calibration)
    _check_arguments(calibration, method, damping)
    layers = _masked_layers(model)
    targets = _targets(layers)
    chosen: list[Tensor] = []
    rows: dict[str, LayerSelection] = {}
    bar = tqdm(total=len(targets), unit="layer", disable=not progress, leave=False)
    with dense_and_still(model, layers), bar:
        for bundle in _bundles(targets):
            grams = input_grams(model, {target.name: target.layers for target in bundle}, calibration)
            for target in bundle:
                bar.set_description_str(target.name)
                weight, figures = _choose(target, grams.pop(target.name), method, refit, damping)
                chosen.append(weight)
                rows.update({name: LayerSelection(name, str(target.pattern), *figures) for name in target.names})
                bar.update()
    # Nothing below can fail, so the model changes wholly or not at all.
    with torch.no_grad():
        for target, weight in zip(targets, chosen, strict=True):
            target.weight.copy_(weight)
    samples = sum(len(batch.noise) for batch in calibration)
    return SelectionReport(method, refit, damping, samples, tuple(rows[name] for name in layers))


def _check_arguments(calibration: Sequence[object], method: str, damping: float) -> None:
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(_METHODS)}")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be a positive number, got {damping}")
    if not calibration:
        raise ValueError("calibration is empty: make it by calibration_set(batches)")
    for batch in calibration:
        if not isinstance(batch, CalibrationBatch):
            got = type(batch).__name__
            raise TypeError(f"calibration must hold CalibrationBatch, got {got}; make it by calibration_set(batches)")


def _masked_layers(model: nn.Module) -> dict[str, nn.Module]:
    if packed_layers(model):
        raise ValueError("model is packed: its dense weights are gone; select masks before pack(model)")
    get_plan(model)
    layers = {name: layer for name, layer in sparse_layers(model).items() if not layer_pattern(layer).is_dense}
    if not layers:
        raise ValueError("every layer's pattern is dense: there is no mask to select; call set_pattern(model, '2:4')")
    for name, layer in layers.items():
        check_weight(name, layer.weight)
    return layers


@dataclass(frozen=True)
class _Target:
    """One weight, and the layers that share it."""

    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    pattern: Pattern

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def weight(self) -> nn.Parameter:
        return self.layers[0].weight


def _targets(layers: Mapping[str, nn.Module]) -> list[_Target]:
    names: dict[int, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(id(layer.weight), []).append(name)
    return [
        _Target(tuple(sharing), tuple(layers[name] for name in sharing), layer_pattern(layers[sharing[0]]))
        for sharing in names.values()
    ]


def _bundles(targets: Iterable[_Target]) -> Iterator[list[_Target]]:
    bundle, held = [], 0
    for target in targets:
        groups, _, width = weight_matrices(target.layers[0]).shape
        size = 8 * groups * width**2
        if bundle and held + size > _GRAM_BYTES:
            yield bundle
            bundle, held = [], 0
        bundle.append(target)
        held += size
    yield bundle


def _choose(
    target: _Target, grams: Tensor, method: str, refit: bool, damping: float
) -> tuple[Tensor, tuple[float, float, float]]:
    """The new weight, zero where its mask drops; with error by magnitude, error and share moved."""
    dense = weight_matrices(target.layers[0]).double()
    # Over the mean squared norm of an input: so a damping means the same in every layer, and scores fit float32.
    hessians = grams / grams.diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(grams.dtype).tiny)
    solutions, masks = [], []
    for weight, hessian in zip(dense, hessians, strict=True):
        used = damping
        if method == "sparsegpt":
            factor, used = inverse_factor(hessian, damping)
            if used > damping:
                _log.warning("layer %r: Hessian singular at damping %.1e, taking %.1e", target.name, damping, used)
            mask, solution = sparsegpt(weight, factor, target.pattern)
        else:
            mask = magnitude_mask(wanda_score(weight, hessian) if method == "wanda" else weight, target.pattern)
            solution = weight.masked_fill(~mask, 0)
        if refit:
            solution = least_squares(weight, mask, hessian, used, solution)
        solutions.append(solution)
        masks.append(mask)
    new = torch.stack(solutions).to(target.weight.dtype)
    if not torch.isfinite(new).all():
        raise ValueError(
            f"layer {target.name!r}: new weights exceed the range of {new.dtype}; raise damping (it is {damping}) or "
            "select masks in float32"
        )
    kept = torch.stack(masks)
    by_magnitude = torch.stack([magnitude_mask(weight, target.pattern) for weight in dense])
    figures = (
        output_error(grams, dense, dense.masked_fill(~by_magnitude, 0)),
        output_error(grams, dense, new.double()),
        ((kept & ~by_magnitude).sum() / kept.sum()).item(),
    )
    return weight_of_matrices(new, tuple(target.weight.shape)), figures
