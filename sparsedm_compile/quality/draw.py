"""Many samples from one model, the same for every model and every number of processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from sparsedm_compile.noise import VPSDE
from sparsedm_compile.sampling import sample


def draw(
    model: nn.Module,
    count: int,
    shape: tuple[int, ...],
    *,
    seed: int = 0,
    process: VPSDE | None = None,
    solver: str = "dpm-solver++",
    steps: int = 20,
    batch: int = 500,
    progress: bool = True,
) -> Tensor:
    """Draw ``count`` images in batches of equal size, so that a compiled model is compiled once.

    Sample ``i`` of ``seed`` starts from the same noise whatever the model, the batch and the number of processes:
    samples of two models can be laid side by side. Under ``torch.distributed`` each process draws its share, and every
    one returns them all.

    Args:
        model: as for :func:`sample`; without condition.
        count: of images.
        shape: of one image, ``(C, H, W)``.
        batch: of each call; a last one that is not full is filled up, so that every call has one size.

    Returns:
        float32 ``(count, *shape)``, clamped to [-1, 1].

    Raises:
        ValueError: ``count`` or ``batch`` below 1; see also :func:`sample`.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    spread = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
    mine = noise.tensor_split(world)[rank]
    fresh = None if solver == "dpm-solver++" else torch.Generator().manual_seed(seed + 1 + rank)
    drawn = [noise[:0]]
    for part in tqdm(mine.split(batch), desc="samples", unit="batch", disable=not progress or rank > 0, leave=False):
        padded = torch.cat([part, noise.new_zeros(batch - len(part), *shape)])
        images = sample(model, padded, process=process, solver=solver, steps=steps, clip=1.0, generator=fresh)
        drawn.append(images[: len(part)].clamp(-1, 1))
    share = torch.cat(drawn)
    if not spread:
        return share
    shares: list[Tensor] = [share] * world
    dist.all_gather_object(shares, share)
    return torch.cat(shares)
