"""Policies: which layers of a model should be sparse at all. They look at names and shapes only, never at weights."""

import logging
import re
from collections.abc import Callable, Sequence

from sparsedm_compile.plan import LayerInfo

_log = logging.getLogger(__name__)

#: A user's policy: True for sparse; False or the reason as a string for dense.
LayerPolicy = Callable[[LayerInfo], bool | str]
#: A built-in policy sees all layers at once. It maps the names of layers left dense to the reason.
_ModelPolicy = Callable[[Sequence[LayerInfo]], dict[str, str]]

# The smallest width at which a sparse layer has ever been seen to win; below it a layer is cheap anyway.
_TINY = 32
_EMBEDDING = re.compile(r"embed|(^|[._])emb([._]|$)|(^|[._])(time|pos|label|class|caption)[._]|timestep")
# An ancestor that is numbered or called a block: "down_blocks.0.", "mid_block.", "layers.3.".
_IN_BLOCK = re.compile(r"(^|\.)(\d+|[^.]*(block|layer)[^.]*)\..")


def _default(layers: Sequence[LayerInfo]) -> dict[str, str]:
    """Any diffusion model: first, last, embedding and tiny layers stay dense.

    First and last are found by structure, since registration order is not execution order: when most layers lie inside
    repeated blocks, those outside are the way in and the way out. A single block compiled on its own has no such
    layers.
    """
    inside = [bool(_IN_BLOCK.search(layer.name)) for layer in layers]
    is_whole_model = sum(inside) * 2 > len(layers)
    reasons = {}
    for layer, in_block in zip(layers, inside, strict=True):
        out_features, in_features = layer.weight_shape[:2]
        if _EMBEDDING.search(layer.name):
            reasons[layer.name] = "policy default: embedding layer"
        elif min(out_features, in_features) < _TINY:
            reasons[layer.name] = f"policy default: tiny layer (fewer than {_TINY} features in or out)"
        elif is_whole_model and not in_block:
            reasons[layer.name] = "policy default: first or last layer (outside the repeated blocks)"
    return reasons


def _sparsedm(suffixes: tuple[str, ...], title: str) -> _ModelPolicy:
    def policy(layers: Sequence[LayerInfo]) -> dict[str, str]:
        dense = {layer.name for layer in layers if not f".{layer.name}".endswith(suffixes)}
        if len(dense) == len(layers):
            raise ValueError(
                f"policy {title!r} is for U-ViT and found none of its layers ({', '.join(s[1:] for s in suffixes)}); "
                "use policy='default' or policy='all' for other models"
            )
        foreign = [name for name in (layer.name for layer in layers) if name in dense and not _UVIT_DENSE.search(name)]
        if foreign:
            _log.warning(
                "policy %r is for U-ViT: it leaves %d of %d layers of this model dense, and U-ViT has no %r; "
                "policy='default' takes all but first, last, embedding and tiny layers, policy='all' takes all",
                title,
                len(dense),
                len(layers),
                foreign[0],
            )
        return dict.fromkeys(dense, f"policy {title}: the paper leaves it dense")

    return policy


# What U-ViT has beside them.
_UVIT_DENSE = re.compile(
    r"(^|\.)(skip_linear|patch_embed\.proj|time_embed\.\d+|context_embed|decoder_pred|final_layer)$"
)
# SparseDM, official code: the four linears of every block; its inference code converts skip_linear as well.
_PAPER = (".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2")

POLICIES: dict[str, _ModelPolicy] = {
    "default": _default,
    "sparsedm": _sparsedm(_PAPER, "sparsedm"),
    "sparsedm+skip": _sparsedm((*_PAPER, ".skip_linear"), "sparsedm+skip"),
    "all": lambda layers: {},
}


def check_policy(policy: str | LayerPolicy) -> None:
    """Refuse what is no policy.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor a callable.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: one of {', '.join(POLICIES)}, or a callable")
    elif not callable(policy):
        raise TypeError(f"policy must be a name or a callable, got {type(policy).__name__}")


def dense_reasons(policy: str | LayerPolicy, layers: Sequence[LayerInfo]) -> dict[str, str]:
    """Name -> reason, for the layers that ``policy`` leaves dense.

    Raises:
        ValueError, TypeError: see :func:`check_policy`; a callable that answers neither a bool nor a string.
    """
    check_policy(policy)
    if isinstance(policy, str):
        return POLICIES[policy](layers) if layers else {}
    reasons = {}
    for layer in layers:
        answer = policy(layer)
        if not isinstance(answer, bool | str):
            raise TypeError(f"policy answered {answer!r} for layer {layer.name!r}: expected True, False or a reason")
        if answer is not True:
            reasons[layer.name] = answer or "policy: left dense"
    return reasons
