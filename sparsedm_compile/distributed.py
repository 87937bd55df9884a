"""What training needs to know of other processes: which share is mine, masks of weights that are spread over them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; ``(0, 1)`` outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes, which then agree on it."""
    _, world = rank_and_world()
    if world > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world
    return value


def on_first_process(action: Callable[[], T]) -> T:
    """What ``action`` returns, or raises, in process 0, in all of them: none waits for one that failed."""
    rank, world = rank_and_world()
    if world == 1:
        return action()
    outcome: list[object] = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def of_all_processes(value: T) -> list[T]:
    """The ``value`` of every process, in the order of their numbers; all must call this, with what can be pickled."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[T] = [value] * world
    dist.all_gather_object(values, value)
    return values


def sharded_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """:func:`magnitude_mask` of the whole weight; for a DTensor a DTensor, spread as the weight is.

    FSDP2 gives each process consecutive output channels. Their groups lie along the inputs, so a process masks its own
    rows; but where its boundary falls between the ``v`` channels that share a choice, their scores lie on two
    processes, and the weight is gathered as in a forward pass. All processes must call this.
    """
    if not isinstance(weight, DTensor):
        return magnitude_mask(weight, pattern)
    mesh, placements = weight.device_mesh, weight.placements
    shards = [mesh.size(dim) for dim, placement in enumerate(placements) if placement == Shard(0)]
    by_rows = all(placement in (Shard(0), Replicate()) for placement in placements) and len(shards) <= 1
    rows = -(-weight.shape[0] // shards[0]) if shards else weight.shape[0]
    if by_rows and rows % pattern.v == 0:
        local = magnitude_mask(weight.to_local(), pattern)
        return DTensor.from_local(local, mesh, placements, shape=weight.shape, stride=weight.stride())
    return shard_like(magnitude_mask(weight.full_tensor(), pattern), weight)


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """``full``, which every process holds alike, spread over them as ``like`` is; as it is for a plain ``like``."""
    if not isinstance(like, DTensor):
        return full
    everywhere = [Replicate()] * like.device_mesh.ndim
    replicated = DTensor.from_local(full.to(like.device), like.device_mesh, everywhere, run_check=False)
    return replicated.redistribute(placements=like.placements)


def share_of(drawn: Tensor) -> Tensor:
    """This process's part of what all of them draw alike for their joint batch; so their number does not matter.

    Args:
        drawn: ``(world * B, ...)``, the same in every process.

    Returns:
        ``(B, ...)``.
    """
    rank, world = rank_and_world()
    return drawn.tensor_split(world)[rank]
