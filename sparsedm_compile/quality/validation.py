"""The denoising loss on images that no model was trained on, with the same noise for every model."""

import torch
from torch import Tensor, nn

from sparsedm_compile.noise import VPSDE


@torch.no_grad()
def validation_loss(model: nn.Module, images: Tensor, *, process: VPSDE | None = None, batch: int = 500) -> float:
    """Mean squared error of the predicted noise, over times spread evenly; every call draws the same ones.

    Args:
        model: called as ``model(x_t, process.time_scale * t)``.
        images: ``(N, C, H, W)`` in [-1, 1]; what exceeds a multiple of ``batch`` is left out, so that a compiled model
            sees one batch size.

    Raises:
        ValueError: fewer images than one batch.
    """
    if len(images) < batch:
        raise ValueError(f"validation_loss needs at least one batch of {batch} images, got {len(images)}")
    process, generator = process or VPSDE(), torch.Generator().manual_seed(0)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    total, count = 0.0, 0
    for clean in images[: len(images) // batch * batch].split(batch):
        t = 1 - (torch.arange(batch) + torch.rand(1, generator=generator)) / batch
        noise = torch.randn(clean.shape, generator=generator)
        x_t = process.perturb(clean, t, noise)
        prediction = process.predict_noise(model, x_t.to(device), t.to(device)).cpu()
        total += (prediction.double() - noise).square().sum().item()
        count += noise.numel()
    return total / count
