"""Many samples from one model, the same for every model and every number of processes."""

import torch
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

    Sample ``i`` of ``seed`` starts from the same noise whatever the model and the batch: samples of two models can be
    laid side by side.

    Args:
        model: as for :func:`sample`; without condition.
        count: of images.
        shape: of one image, ``(C, H, W)``.

    Returns:
        float32 ``(count, *shape)``, clamped to [-1, 1].

    Raises:
        ValueError: ``count`` or ``batch`` below 1; see also :func:`sample`.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    fresh = None if solver == "dpm-solver++" else torch.Generator().manual_seed(seed + 1)
    batch = min(batch, count)
    drawn = []
    for part in tqdm(noise.split(batch), desc="samples", unit="batch", disable=not progress, leave=False):
        missing = batch - len(part)
        padded = torch.cat([part, noise[:missing]]) if missing else part
        images = sample(model, padded, process=process, solver=solver, steps=steps, clip=1.0, generator=fresh)
        drawn.append(images[: len(part)].clamp(-1, 1))
    return torch.cat(drawn)
