"""Batches gone through again and again, from a place that can be saved and found again."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

_END = object()


class RepeatedBatches(Iterator[Any]):
    """An endless iterator over ``batches``, pass after pass, whose position can be saved.

    A position is the number of batches taken in the current pass, and the states that the random generators had at
    its start: torch's default one and those of a DataLoader and its samplers. Going back means to set those states,
    to begin the pass again and to skip. So it leads to the same batches if a pass depends on nothing else: data and
    loader are built as before, and what is random in them (the order, the seeds of workers, augmentation) is drawn
    from these generators. Samplers with ``set_epoch``, as ``DistributedSampler``, are told the number of the pass.

    Args:
        batches: a DataLoader, a list, or a generator, which must last for the whole run and be made anew to go back.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._iterator: Iterator[Any] = iter(())
        self._passes = 0
        self._taken = 0
        self._start = [generator.get_state() for generator in self._generators()]

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            ValueError: there are no batches, or a generator has run out.
        """
        batch = next(self._iterator, _END)
        if batch is _END:
            before = self._taken
            self._begin_pass()
            batch = next(self._iterator, _END)
            if batch is _END:
                raise ValueError(
                    f"batches ended after {before} and cannot be gone through again: pass a list, a DataLoader, or a "
                    "generator that never ends"
                    if before
                    else "batches is empty: nothing to train on"
                )
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Passes begun, batches taken in this one, and the generators' states at its start (or at construction)."""
        return {"passes": self._passes, "taken": self._taken, "start": list(self._start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved position; the generators end as they were there.

        Raises:
            ValueError: the data ends before it, or the loader has other generators.
        """
        generators = self._generators()
        if len(generators) != len(state["start"]):
            raise ValueError(
                f"the saved position has {len(state['start'])} random generators, these batches {len(generators)}: "
                "build the DataLoader as before"
            )
        for generator, start in zip(generators, state["start"], strict=True):
            generator.set_state(start)
        self._iterator, self._passes, self._taken, self._start = iter(()), 0, 0, list(state["start"])
        if not state["passes"]:
            return
        self._passes = state["passes"] - 1
        self._begin_pass()
        for _ in range(state["taken"]):
            if next(self._iterator, _END) is _END:
                raise ValueError(
                    f"the saved position is {state['taken']} batches into a pass, and these batches end after "
                    f"{self._taken}: pass the data that the run began with"
                )
            self._taken += 1

    def _begin_pass(self) -> None:
        for sampler in (getattr(self._batches, "sampler", None), getattr(self._batches, "batch_sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._passes)
        self._start = [generator.get_state() for generator in self._generators()]
        self._iterator = iter(self._batches)
        self._passes += 1
        self._taken = 0

    def _generators(self) -> list[torch.Generator]:
        holders = [
            self._batches,
            getattr(self._batches, "sampler", None),
            getattr(self._batches, "batch_sampler", None),
        ]
        holders.append(getattr(holders[2], "sampler", None))
        found = [torch.default_generator, *(getattr(holder, "generator", None) for holder in holders)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
