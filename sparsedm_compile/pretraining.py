"""Training a dense diffusion model from its weights: what the sparse rows of a recipe start from."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsedm_compile.ema import EMA
from sparsedm_compile.finetune import distillation_loss
from sparsedm_compile.noise import VPSDE
from sparsedm_compile.training import TrainingRecord, train
from sparsedm_compile.training_log import TrainingLog


def pretrain(
    model: nn.Module,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    steps: int,
    process: VPSDE | None = None,
    learning_rate: float = 5e-4,
    weight_decay: float = 0.03,
    warmup_steps: int = 100,
    ema_decay: float = 0.999,
    amp: str | None = None,
    checkpoint_dir: Path | str | None = None,
    checkpoint_every: int = 500,
    log: TrainingLog | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingRecord:
    """Train ``model`` in place to predict the noise; at the end it holds the averaged weights.

    Args:
        model: called as ``model(x_t, process.time_scale * t, *condition)``.
        batches: of clean data ``(B, ...)``, or of ``(data, *condition)``; gone through again and again.
        steps, warmup_steps, checkpoint_dir, checkpoint_every, log, progress: see
            :func:`sparsedm_compile.training.train`.
        process: the noise process; the default is that of U-ViT's pixel models.
        learning_rate, weight_decay: of AdamW, with betas 0.9 and 0.99 as in U-ViT's code.
        ema_decay: see :class:`EMA`.
        amp: ``"bfloat16"`` or ``"float16"`` for autocast; None for float32.
        seed: of times and noise; the order of the data is the caller's.

    Raises:
        ValueError, FloatingPointError: as :func:`sparsedm_compile.training.train`.
    """
    if amp not in (None, "bfloat16", "float16"):
        raise ValueError(f"amp must be 'bfloat16', 'float16' or None, got {amp!r}")
    process = process or VPSDE()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)

    def loss(batch: Tensor | Sequence[Tensor]) -> Tensor:
        clean, *condition = (t.to(device) for t in ((batch,) if isinstance(batch, Tensor) else batch))
        t = process.sample_times(len(clean), device=device, generator=generator)
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=device, generator=generator)
        with torch.autocast(device.type, getattr(torch, amp)) if amp else nullcontext():
            prediction = process.predict_noise(model, process.perturb(clean, t, noise), t, *condition)
        return distillation_loss(prediction, noise, None, distillation_weight=0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    return train(
        model,
        optimizer,
        loss,
        batches,
        ema=EMA(model, ema_decay),
        steps=steps,
        warmup_steps=warmup_steps,
        scaler=torch.amp.GradScaler(device.type) if amp == "float16" else None,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        stateful={"noise": generator},
        settings={
            "process": repr(process),
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "ema_decay": ema_decay,
            "amp": amp,
            "seed": seed,
        },
        log=log,
        progress=progress,
        description="pretrain",
    )
