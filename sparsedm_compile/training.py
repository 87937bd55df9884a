"""A training loop for diffusion models: warm-up, clipping, averaged weights, progress, a stop before bad weights."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from sparsedm_compile.ema import EMA


@dataclass
class TrainingRecord:
    """What a run did.

    Attributes:
        steps: optimizer steps done.
        seconds: wall time.
        losses: one a step.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[Any], Tensor],
    batches: Iterable[Any],
    *,
    ema: EMA,
    steps: int | None = None,
    seconds: float | None = None,
    warmup_steps: int = 100,
    max_grad_norm: float = 1.0,
    before_step: Callable[[int], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    progress: bool = True,
    description: str = "train",
) -> TrainingRecord:
    """Train ``model`` and leave the averaged weights in it, also when the run ends early.

    Loss and gradient norm are checked before each step, so the weights are good whenever this returns or raises.

    Args:
        model: put into training mode for the run, and back into its own after it.
        optimizer: of the model's parameters; its learning rates are reached by a linear warm-up and then kept.
        loss: ``batch -> scalar``.
        batches: gone through again and again; an iterable that cannot be restarted must last for the whole run.
        ema: an average started from ``model``.
        steps, seconds: the run ends at whichever comes first; at least one is needed. How many steps a run limited in
            time does depends on the machine.
        warmup_steps: the learning rate grows linearly over so many steps; the official runs use thousands.
        max_grad_norm: gradients are scaled down to this norm; ``math.inf`` for no clipping.
        before_step: called with the number of each step, from 0, before its loss is asked for.
        scaler: of the loss, for float16. A step whose gradients overflow is left out and the scale lowered; that is an
            error only where the scale is 1 or less already.
        progress: show a progress bar.
        description: what the bar is called.

    Raises:
        ValueError: a limit that is missing or not positive; ``batches`` is empty or ran out.
        FloatingPointError: the loss or its gradient is not finite; the message names the step.
    """
    check_limits(steps, seconds, warmup_steps, max_grad_norm)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    record = TrainingRecord()
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0)
    mode = model.training
    model.train()
    start = time.perf_counter()
    try:
        with _bar(steps, seconds, description, progress) as bar:
            for batch in itertools.islice(_repeat(batches), steps):
                optimizer.zero_grad(set_to_none=True)
                if before_step is not None:
                    before_step(record.steps)
                value = loss(batch)
                scaler.scale(value).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                loss_value, overflowed = _check_finite(record.steps, value, norm, scaler)
                scaler.step(optimizer)
                scaler.update()
                if not overflowed:
                    schedule.step()
                    ema.update(model)
                record.losses.append(loss_value)
                record.steps += 1
                record.seconds = time.perf_counter() - start
                _advance(bar, record, seconds)
                if seconds is not None and record.seconds >= seconds:
                    break
    finally:
        optimizer.zero_grad(set_to_none=True)
        ema.copy_to(model)
        model.train(mode)
    return record


def check_limits(steps: int | None, seconds: float | None, warmup_steps: int, max_grad_norm: float) -> None:
    """Refuse, with a ValueError, limits that are missing or not positive."""
    if steps is None and seconds is None:
        raise ValueError("training needs a limit: pass steps=..., seconds=..., or both")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
    if not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive (math.inf for no clipping), got {max_grad_norm}")


def _repeat(batches: Iterable[Any]) -> Iterator[Any]:
    given = 0
    while True:
        before = given
        for batch in batches:
            given += 1
            yield batch
        if given == before:
            raise ValueError(
                f"batches ended after {given} and cannot be gone through again: pass a list, a DataLoader, or a "
                "generator that never ends"
                if given
                else "batches is empty: nothing to train on"
            )


def _check_finite(done: int, loss: Tensor, norm: Tensor, scaler: torch.amp.GradScaler) -> tuple[float, bool]:
    """The loss, and whether its gradients overflowed at a loss scale that can still be lowered."""
    kept = f"at step {done + 1}; the model keeps the averaged weights of the {done} steps before"
    value, norm_value = torch.stack([loss.detach().float(), norm.float()]).tolist()  # one synchronisation for both
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} {kept}")
    overflowed = not math.isfinite(norm_value)
    if overflowed and not (scaler.is_enabled() and scaler.get_scale() > 1):
        raise FloatingPointError(f"the gradient norm is {norm_value} (loss {value:.4g}) {kept}")
    return value, overflowed


def _bar(steps: int | None, seconds: float | None, description: str, progress: bool) -> tqdm:
    if seconds is None:
        return tqdm(total=steps, desc=description, unit="step", disable=not progress, leave=False)
    layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} s [{remaining} left{postfix}]"
    return tqdm(total=seconds, desc=description, bar_format=layout, disable=not progress, leave=False)


def _advance(bar: tqdm, record: TrainingRecord, seconds: float | None) -> None:
    recent = record.losses[-20:]
    postfix = f"loss {sum(recent) / len(recent):.4f}"
    if seconds is None:
        bar.set_postfix_str(postfix, refresh=False)
        bar.update(1)
    else:
        bar.set_postfix_str(f"{postfix}, {record.steps / record.seconds:.1f} steps/s", refresh=False)
        bar.update(min(record.seconds, seconds) - bar.n)
