"""What a plan may decide: the patterns that each layer can take, with layers of one weight tied together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.plan import Plan
from sparsedm_compile.planning import Rules, make_plan, named_modules, unwrap
from sparsedm_compile.policy import LayerPolicy
from sparsedm_compile.sparsify import check_weight


@dataclass(frozen=True)
class Choice:
    """One decision of a plan.

    Attributes:
        names: the layers that share one weight and so must take one pattern; nearly always a single layer.
        options: what they may take; a single option where policy or rules leave no choice.
    """

    names: tuple[str, ...]
    options: tuple[Pattern, ...]

    @property
    def name(self) -> str:
        """The first of the layers, by which tables know the choice."""
        return self.names[0]


def layer_choices(
    model: nn.Module,
    candidates: Sequence["str | Pattern"],
    policy: str | LayerPolicy = "default",
    rules: Rules | None = None,
) -> tuple[Choice, ...]:
    """The decisions that a plan of ``model`` consists of, every layer in exactly one of them, in model order.

    A layer that the policy selects may take each candidate that fits its shape, or stay dense; one that a rule names
    has the pattern of that rule; all others are dense.

    Args:
        model: dense; not changed.
        candidates: patterns; ``"dense"`` is always one of them and need not be named.
        policy, rules: as in :func:`sparsedm_compile.sparsify`.

    Raises:
        ValueError: no sparse candidate, an unknown one, or none that any layer takes; the model is sparse or packed
            already, has no layers, or weights that cannot be masked; rules that give one shared weight two patterns.
        TypeError: an argument of the wrong type.
    """
    model = unwrap(model)
    if packed_layers(model) or sparse_layers(model):
        state = "packed" if packed_layers(model) else "sparse"
        raise ValueError(f"model is {state} already: a plan is made for the dense model, before sparsify")
    if isinstance(candidates, str | Pattern) or not isinstance(candidates, Sequence):
        raise TypeError(f"candidates must be a list of patterns such as ['2:4', '1:4'], got {candidates!r}")
    patterns = list(dict.fromkeys([DENSE, *map(Pattern.parse, candidates)]))
    if patterns == [DENSE]:
        raise ValueError(f"candidates hold no sparse pattern ({list(candidates)}): name at least one, such as '2:4'")
    plans = [make_plan(model, pattern, policy, rules) for pattern in patterns]
    if not any(plan.patterns() for plan in plans):
        reasons = sorted({layer.reason for plan in plans[1:] for layer in plan})
        wanted = ", ".join(map(str, patterns[1:]))
        raise ValueError(f"no layer of {type(model).__name__} takes any of {wanted}: {'; '.join(reasons)}")

    modules = dict(named_modules(model))
    tied: dict[int, list[str]] = {}
    for layer in plans[0]:
        owner = getattr(modules[layer.name], "weight", None)
        tied.setdefault(id(modules[layer.name] if owner is None else owner), []).append(layer.name)
    choices = [Choice(tuple(names), _common_options(names, plans)) for names in tied.values()]
    for choice in choices:
        if choice.options != (DENSE,):
            check_weight(choice.name, modules[choice.name].weight)
    return tuple(choices)


def _common_options(names: Sequence[str], plans: Sequence[Plan]) -> tuple[Pattern, ...]:
    options = [dict.fromkeys(plan[name].pattern for plan in plans) for name in names]
    common = tuple(pattern for pattern in options[0] if all(pattern in other for other in options))
    if not common:
        raise ValueError(
            f"layers {', '.join(map(repr, names))} share one weight, but rules and policy leave them no pattern in "
            "common; give them one pattern with rules={...}"
        )
    return common
