"""``permute_channels``: reorder a model's channels, so that its masks keep more and its function is the same."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsedm_compile.calibration import CalibrationBatch, check_calibration
from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.modes import evaluating
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.permutation.capture import find_channels, first_names, named_tensors
from sparsedm_compile.permutation.channels import Axis
from sparsedm_compile.permutation.gains import SparseWeight
from sparsedm_compile.permutation.measured import PrunedDamage, least_damage
from sparsedm_compile.permutation.report import AxisReport, LayerKept, PermutationReport
from sparsedm_compile.permutation.search import search
from sparsedm_compile.plan import Plan
from sparsedm_compile.planning import Rules, make_plan, named_modules, unwrap
from sparsedm_compile.policy import LayerPolicy
from sparsedm_compile.selection.matrix import weight_of_matrices
from sparsedm_compile.selection.statistics import mean_squares
from sparsedm_compile.sparsify import check_weight, get_plan, use_pattern

# Relative, of outputs in float32: reordered sums move them by 1e-7 to 1e-6, a wrong permutation by 1e-1 or more.
_TOLERANCE = 1e-5


def permute_channels(
    model: nn.Module,
    *inputs: Any,
    pattern: "str | Pattern | None" = None,
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
    calibration: Iterable[CalibrationBatch] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> PermutationReport:
    """Reorder the channels of ``model``, in place, so that N:M masks keep more magnitude; its function stays the same.

    Which channels of which parameters must move together follows from the graph of one call,
    ``model(*inputs, **kwargs)``. What the analysis does not understand, what meets a model input, output or computed
    constant, and buffers that checkpoints do not hold, stay as they are; the report says so. ``state_dict`` keys and
    shapes are unchanged.

    The outputs on ``inputs`` are compared before and after, dense, in eval mode, in float32; a relative difference
    above 1e-5 undoes everything and raises. So that the check says something, pass inputs like those it was trained on.

    Permute before training: optimizers and averages that hold state per weight must be made afterwards. The call must
    take the path of later calls (the same optional inputs); parameters that it does not use are listed in the report.

    Args:
        model: with its weights loaded; dense, or sparsified (then its plan decides).
        pattern, policy, rules: of a dense model's masks to come, as in :func:`sparsify`; ``pattern`` defaults to
            ``"2:4"``.
        calibration: what the model is called with, see :func:`calibration_set`; two passes over it for each set of
            coupled axes. An order that keeps magnitude is then weighed against one that keeps magnitude times the root
            mean square of the inputs, as in Wanda, and against the order at hand, for each set of axes, by the damage
            of pruning by magnitude: the mean squared change of the output. Without it what the masks keep is all that
            is looked at, and where a permutation gains little, the damage may even rise; see
            ``bench/permutation.py``.
        seed: of the search, which is deterministic.
        kwargs: keyword inputs of the model; one named like a parameter above must be passed by position.

    Returns:
        What moved, what stayed and why, and what the masks keep, by layer.

    Raises:
        ValueError: what :func:`sparsify` raises for the plan; a sparse model given a pattern; a packed model; outputs
            that are all zeros or not finite, on which nothing can be checked; calibration that is empty, does not reach
            a layer, or holds values that are not finite.
        TypeError: not a module; weights that are not float32, bfloat16 or float16; calibration that holds no
            :class:`CalibrationBatch`.
        RuntimeError: the call cannot be captured, or the outputs differed.
        In every case the model is left as it was.

    Sources: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021; Sun et al., arXiv 2306.11695 (Wanda).
    """
    model = unwrap(model)
    if calibration is not None:
        calibration = list(calibration)
        check_calibration(calibration)
    with _dense_eval(model, pattern, policy, rules) as plan:
        targets = _targets(model, plan)
        shares = {name: _kept_share(weight, plan[name].pattern) for name, weight in targets.items()}
        outputs = _outputs(model, inputs, kwargs)
        if not all(torch.isfinite(output).all() for output in outputs):
            raise ValueError("the model's output on these inputs is not finite, so no permutation can be checked on it")
        if not any(output.any() for output in outputs):
            raise ValueError(
                "the model's output on these inputs is all zeros, so no permutation can be checked on it: load its "
                "weights first, or pass other inputs"
            )
        channels, unused = find_channels(model, inputs, kwargs)
        solution = channels.solve()

        tensors = named_tensors(model)
        names = first_names(tensors)
        magnitudes = {name: weight.detach().abs().float() for name, weight in targets.items()}

        def searched(scores: Mapping[str, Tensor]) -> np.ndarray:
            weights = defaultdict(list)
            for name, score in scores.items():
                score = score.reshape(*score.shape[:2], -1).clone()  # the search permutes it
                weights[names[id(targets[name])]].append(SparseWeight(plan[name].pattern, score))
            return search(solution.families, channels.axes, weights, seed)

        content, damages = searched(magnitudes), None
        if calibration is not None:
            patterns = {names[id(weight)]: plan[name].pattern for name, weight in targets.items()}
            damage = PrunedDamage(model, calibration, tensors, names, channels.axes, patterns)
            candidates = [content, searched(_times_inputs(model, magnitudes, calibration))]
            content, *damages = least_damage(candidates, solution.coupled, damage)

        with _permuted(tensors, channels.axes, content):
            difference = _difference(outputs, _outputs(model, inputs, kwargs))
            if not difference <= _TOLERANCE:
                raise RuntimeError(
                    f"permuting {type(model).__name__} changed its output by a relative {difference:.1e}, above "
                    f"{_TOLERANCE:.0e}: everything was put back. Either its float32 arithmetic is that sensitive on "
                    "these inputs (pass inputs like those it was trained on), or the analysis misjudged an operator"
                )
    layers = tuple(
        LayerKept(name, str(plan[name].pattern), *shares[name], _kept_share(weight, plan[name].pattern)[1])
        for name, weight in targets.items()
    )
    axes = tuple(
        AxisReport(
            tuple(str(axis) for axis in coupled.axes if axis.tensor),
            len(coupled.classes),
            coupled.free,
            int((content[coupled.classes] != coupled.classes).sum()),
            coupled.pinned,
        )
        for coupled in solution.coupled
        if any(
            (plan[name].pattern.v, plan[name].pattern.m)[axis.dim] > 1
            for axis in coupled.axes
            if axis.dim < 2
            for name, weight in targets.items()
            if names[id(weight)] == axis.tensor
        )
    )
    return PermutationReport(axes, layers, difference, tuple(unused), *(damages or ()))


@contextmanager
def _dense_eval(
    model: nn.Module, pattern: "str | Pattern | None", policy: str | LayerPolicy, rules: Rules | None
) -> Iterator[Plan]:
    """The plan of the masks, with the model dense and in eval mode for the length of the block."""
    if packed_layers(model):
        raise ValueError("model is packed: its channels are fixed; permute the model that it was made of")
    sparse = bool(sparse_layers(model))
    if sparse and (pattern is not None or policy != "default" or rules is not None):
        raise ValueError("model is sparse already and its plan decides: leave out pattern, policy and rules")
    plan = get_plan(model) if sparse else make_plan(model, "2:4" if pattern is None else pattern, policy, rules)
    with evaluating(model), use_pattern(model, "dense") if sparse else nullcontext():
        yield plan


def _targets(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Name -> weight of each layer that the plan makes sparse."""
    modules = dict(named_modules(model))
    targets = {name: modules[name].weight for name in plan.patterns()}
    if not targets:
        raise ValueError(
            f"the plan leaves every layer of {type(model).__name__} dense: there is no mask to permute for"
        )
    for name, weight in targets.items():
        check_weight(name, weight)
    return targets


def _kept_share(weight: Tensor, pattern: Pattern) -> tuple[float, float]:
    """``(sum |W|, share of it that the mask keeps)``."""
    magnitude = weight.detach().abs().double()
    total = magnitude.sum().item()
    kept = (magnitude * magnitude_mask(weight, pattern)).sum().item()
    return total, kept / total if total else 1.0


def _times_inputs(
    model: nn.Module, magnitudes: Mapping[str, Tensor], calibration: Sequence[CalibrationBatch]
) -> dict[str, Tensor]:
    """Each magnitude times the root mean square of the input that its weight multiplies."""
    modules = dict(named_modules(model))
    # Hooks that are added after Dynamo compiled a part of the model would be passed by.
    with torch.compiler.set_stance("force_eager"):
        squares = mean_squares(model, {name: [modules[name]] for name in magnitudes}, calibration)
    scores = {}
    for name, magnitude in magnitudes.items():
        groups, width = squares[name].shape
        size = squares[name].sqrt().float().unsqueeze(1).expand(groups, len(magnitude) // groups, width)
        scores[name] = magnitude * weight_of_matrices(size, tuple(magnitude.shape))
    return scores


def _outputs(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating-point tensors that the call returns, computed in float32 where the model is in half precision.

    Half precision would hide a small mistake: permuting reorders sums, and bfloat16 alone makes that 1e-2.
    """
    half = (torch.bfloat16, torch.float16)

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in half else value

    tensors = named_tensors(model)
    wide = {name: widen(tensors[name]) for name in first_names(tensors).values() if tensors[name].dtype in half}
    inputs, kwargs = pytree.tree_map(widen, (inputs, kwargs))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # a model that draws noise must draw the same before and after
        result = torch.func.functional_call(model, wide, inputs, kwargs)
    leaves = pytree.tree_leaves(result)
    outputs = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not outputs:
        raise ValueError(f"{type(model).__name__} returned no floating-point tensor to check a permutation on")
    return outputs


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """``||after - before|| / ||before||`` of the worst output."""

    def relative(old: Tensor, new: Tensor) -> float:
        difference, size = (new - old).double().norm().item(), old.double().norm().item()
        return difference / size if size else difference

    return max(relative(old, new) for old, new in zip(before, after, strict=True))


@contextmanager
def _permuted(tensors: dict[str, Tensor], axes: Sequence[Axis], content: np.ndarray) -> Iterator[None]:
    """Permute tensors, and their gradients, in place; an error in the block puts them back."""
    moves = []
    for axis in axes:
        order = content[axis.start : axis.start + axis.size] - axis.start
        if axis.tensor and (np.diff(order) != 1).any():
            moves.append((tensors[axis.tensor], axis.dim, torch.from_numpy(order)))
    done = []
    try:
        for tensor, dim, order in moves:
            _reorder(tensor, dim, order)
            done.append((tensor, dim, order.argsort()))
        yield
    except BaseException:
        for tensor, dim, order in done:
            _reorder(tensor, dim, order)
        raise


def _reorder(tensor: Tensor, dim: int, order: Tensor) -> None:
    with torch.no_grad():
        for part in (tensor, tensor.grad):
            if part is not None:
                part.copy_(part.index_select(dim, order.to(part.device)))
