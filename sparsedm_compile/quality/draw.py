"""Many samples from one model, the same for every model and every number of processes."""

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsedm_compile.distributed import of_all_processes, rank_and_world
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

    Sample ``i`` of ``seed`` starts from the same noise whatever the model and the number of processes (and the batch,
    but for the fresh noise of ``"euler-maruyama"``): samples of two models can be laid side by side. Under
    ``torch.distributed`` each process draws every so many batches, and all return the whole.

    Args:
        model: as for :func:`sample`; without condition.
        count: of images.
        shape: of one image, ``(C, H, W)``.
        batch: of each call; a last one that is not full is filled up, so that every call has one size.

    Returns:
        float32 ``(count, *shape)`` on the CPU, clamped to [-1, 1].

    Raises:
        ValueError: ``count`` or ``batch`` below 1; see also :func:`sample`.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    rank, world = rank_and_world()
    mine = list(enumerate(noise.split(batch)))[rank::world]
    drawn: dict[int, Tensor] = {}
    for index, part in tqdm(mine, desc="samples", unit="batch", disable=not progress or rank > 0, leave=False):
        padded = torch.cat([part, part.new_zeros(batch - len(part), *shape)]).to(device)
        fresh = None if solver == "dpm-solver++" else _fresh_noise(seed, index, device)
        images = sample(model, padded, process=process, solver=solver, steps=steps, clip=1.0, generator=fresh)
        drawn[index] = images[: len(part)].clamp(-1, 1).cpu()
    everyone = {index: images for share in of_all_processes(drawn) for index, images in share.items()}
    return torch.cat([everyone[index] for index in sorted(everyone)])


def _fresh_noise(seed: int, index: int, device: torch.device) -> torch.Generator:
    """A stream of its own for each batch of each seed: ``seed + index`` would give two seeds the same images."""
    (mixed,) = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed) >> 1)
