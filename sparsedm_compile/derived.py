"""Tensors derived from a weight (packed, masked), found by the weight's identity and renewed when it changes."""

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsedm_compile.kernels.cpu.checksum import sampled_checksum

Derived = tuple[Tensor, ...]


class Request(NamedTuple):
    """One derived form of one weight: ``key`` names the form, ``build`` makes it."""

    weight: Tensor
    key: Hashable
    build: Callable[[Tensor], Derived]


@dataclass
class _Entry:
    weight: weakref.ref
    stamp: tuple
    forms: dict[Hashable, Derived] = field(default_factory=dict)


class DerivedWeights:
    """A weak map: weight -> derived tensors, valid for as long as the weight's stamp stays the same.

    Compiled graphs take derived tensors as inputs and ask here at every call, because equal blocks share one graph: a
    packed weight held by the graph would give every block the first block's weights.

    A stamp is (version, data pointer, sampled checksum). ``weight.data = t`` changes only the pointer and
    ``weight.data += t``, which is how LoRA is fused, changes none but the checksum. The checksum reads some 64
    elements and only on the CPU (on a GPU it would cost a synchronisation): a change it cannot see needs
    :func:`refresh`.

    Entries die with their weight. Thread-safe: each form is built once, under a lock.

    A model of small layers feels what a look-up costs (``bench/scaling.py --only costs``), and twice as much by way of
    ``WeakTensorKeyDictionary`` and a ``detach`` of each weight.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by id, which a dead weight leaves to the next one
        self._lock = threading.RLock()

    def get(self, requests: Sequence[Request]) -> list[Derived]:
        """The current derived tensors, one tuple a request, building what is missing or stale."""
        found = []
        for request, stamp in zip(requests, _stamps([r.weight for r in requests]), strict=True):
            entry = self._entry(request.weight, stamp)
            form = None if entry is None else entry.forms.get(request.key)
            found.append(form if form is not None else self._build(request, stamp))
        return found

    def _entry(self, weight: Tensor, stamp: tuple) -> _Entry | None:
        entry = self._entries.get(id(weight))
        return entry if entry is not None and entry.weight() is weight and entry.stamp == stamp else None

    def _build(self, request: Request, stamp: tuple) -> Derived:
        with self._lock:
            entry = self._entry(request.weight, stamp)
            if entry is None:
                entry = self._entries[id(request.weight)] = _Entry(self._watch(request.weight), stamp)
            if request.key not in entry.forms:
                # Plain tensors even under inference_mode: an inference tensor could not serve a later autograd call.
                with torch.inference_mode(False), torch.no_grad():
                    entry.forms[request.key] = request.build(request.weight.detach())
            return entry.forms[request.key]

    def _watch(self, weight: Tensor) -> weakref.ref:
        place = id(weight)

        def forget(dead: weakref.ref) -> None:
            entry = self._entries.get(place)
            if entry is not None and entry.weight is dead:
                self._entries.pop(place, None)

        return weakref.ref(weight, forget)

    def drop(self, weight: Tensor) -> None:
        """Forget everything derived from ``weight``."""
        with self._lock:
            self._entries.pop(id(weight), None)


def _stamps(weights: list[Tensor]) -> list[tuple]:
    on_cpu = [w for w in weights if w.device.type == "cpu"]
    sums = iter(sampled_checksum(on_cpu))
    return [
        (
            -1 if w.is_inference() else w._version,  # inference tensors keep no version
            w.data_ptr(),
            w.dtype,
            w.shape,
            next(sums) if w.device.type == "cpu" else 0,
        )
        for w in weights
    ]


#: The one map of the process; layers and compiled graphs share it.
derived_weights = DerivedWeights()


def refresh(model: nn.Module) -> None:
    """Forget what was packed from the weights of ``model``, so that the next call packs them anew.

    Needed only after a change that no tensor counter shows: through ``weight.data``, of less than a fiftieth of the
    weight on the CPU (a single element, a row), or of any size on a GPU. Ordinary updates (optimizers,
    ``load_state_dict``, ``copy_``, LoRA fusing on the CPU) are noticed without it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"refresh expects a torch.nn.Module, got {type(model).__name__}")
    for parameter in model.parameters():
        derived_weights.drop(parameter)
