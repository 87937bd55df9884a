"""A training loop for diffusion models: warm-up, clipping, averaged weights, progress, a stop before bad weights."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from sparsedm_compile.data_position import RepeatedBatches
from sparsedm_compile.distributed import mean_over_processes, rank_and_world
from sparsedm_compile.ema import EMA
from sparsedm_compile.modes import keeping_modes
from sparsedm_compile.planning import unwrap
from sparsedm_compile.training_checkpoint import ProcessState, TrainingCheckpoints
from sparsedm_compile.training_log import TrainingLog


@dataclass
class TrainingRecord:
    """What a run did.

    Attributes:
        steps: optimizer steps done, those before an interruption included.
        seconds: wall time, alike.
        losses: one a step.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The attributes; the losses as a float64 tensor."""
        return {"steps": self.steps, "seconds": self.seconds, "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.steps, self.seconds, self.losses = state["steps"], state["seconds"], state["losses"].tolist()


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
    checkpoint_dir: Path | str | None = None,
    checkpoint_every: int = 1000,
    stateful: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    log: TrainingLog | None = None,
    progress: bool = True,
    description: str = "train",
) -> TrainingRecord:
    """Train ``model`` and leave the averaged weights in it, also when the run ends early.

    Loss and gradient norm are checked before each step, so the weights are good whenever this returns or raises.

    Under torchrun every process calls this with its part of the batches, ``model`` in DDP or FSDP2: losses are means
    over the processes, which save and go on together, and may be another number when they go on.

    Args:
        model: put into training mode for the run; each of its modules has its own mode back after it.
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
        checkpoint_dir: the whole state of the run is saved here, and a run that finds one goes on from it, one process
            on a CPU bit for bit as if it had never stopped, as many processes as before up to rounding. In another
            number of processes the losses go on alike, up to rounding, if the order of the data is drawn alike in every
            process and the model draws nothing (no dropout): see :class:`ProcessState`. It needs the same arguments
            but for ``steps`` and ``seconds``, which count from the first start, the same model with any weights, and
            batches as :class:`RepeatedBatches` says; randomness of other sources than torch's default generators
            belongs into ``stateful``. A run folder must be trusted as code is: torch.distributed.checkpoint, which
            writes it under FSDP2, unpickles its metadata.
        checkpoint_every: steps from one checkpoint to the next; there is one at the end too.
        stateful: what else changes during the run and is saved with it: objects with ``state_dict`` and
            ``load_state_dict``, or torch Generators that ``loss`` draws from.
        settings: JSON values that a run must share with the one that it goes on with.
        log: told the loss and learning rate of each step, by the first process.
        progress: show a progress bar.
        description: what the bar is called.

    Raises:
        ValueError: a limit that is missing or not positive; ``batches`` is empty or ran out; a checkpoint that is
            damaged, or of another run.
        OSError: checkpoints cannot be saved in ``checkpoint_dir``, which is found before the first step; or one could
            not be saved later. The one before is intact.
        FloatingPointError: the loss or its gradient is not finite; the message names the step. The last checkpoint
            stays.
    """
    check_limits(steps, seconds, warmup_steps, max_grad_norm, checkpoint_every)
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    record, data = TrainingRecord(), RepeatedBatches(batches)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0)
    checkpoints = None
    if checkpoint_dir is not None:
        parts = {
            "optimizer": optimizer,
            "lr_schedule": schedule,
            "scaler": scaler,
            "model": unwrap(model),
        }
        parts |= {"ema": ema, "record": record, **(stateful or {})}
        parts["process"] = ProcessState(data, device)
        own = {"optimizer": type(optimizer).__name__, "warmup_steps": warmup_steps, "max_grad_norm": max_grad_norm}
        settings = {**own, **(settings or {})}
        checkpoints = TrainingCheckpoints(checkpoint_dir, parts, settings)
        checkpoints.restore()
    start = time.perf_counter() - record.seconds
    try:
        if checkpoints is not None and not _reached(record, steps, seconds):  # a run that is done saves nothing more
            checkpoints.check_writable()
        with keeping_modes(model), _bar(steps, seconds, description, progress and rank_and_world()[0] == 0) as bar:
            model.train()
            _advance(bar, record, seconds)
            while not _reached(record, steps, seconds):
                batch = next(data)
                optimizer.zero_grad(set_to_none=True)
                if before_step is not None:
                    before_step(record.steps)
                value = loss(batch)
                scaler.scale(value).backward()
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
                norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                value = mean_over_processes(value.detach().float())
                loss_value, overflowed = _check_finite(record.steps, value, norm, scaler, checkpoints)
                learning_rate = optimizer.param_groups[0]["lr"]
                scaler.step(optimizer)
                scaler.update()
                if not overflowed:
                    schedule.step()
                    ema.update(model)
                record.losses.append(loss_value)
                record.steps += 1
                record.seconds = time.perf_counter() - start
                if seconds is not None and rank_and_world()[1] > 1:  # all processes must stop at the same step
                    record.seconds = mean_over_processes(torch.tensor(record.seconds, device=device)).item()
                _advance(bar, record, seconds)
                if log is not None and rank_and_world()[0] == 0:
                    log.write(record.steps, {"loss": loss_value, "learning_rate": learning_rate})
                due = record.steps % checkpoint_every == 0 or _reached(record, steps, seconds)
                if checkpoints is not None and due:
                    checkpoints.save(record.steps)
    finally:
        optimizer.zero_grad(set_to_none=True)
        ema.copy_to(model)
    return record


def _reached(record: TrainingRecord, steps: int | None, seconds: float | None) -> bool:
    return (steps is not None and record.steps >= steps) or (seconds is not None and record.seconds >= seconds)


def check_limits(
    steps: int | None, seconds: float | None, warmup_steps: int, max_grad_norm: float, checkpoint_every: int
) -> None:
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
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1 step, got {checkpoint_every}")


def _check_finite(
    done: int,
    loss: Tensor,
    norm: Tensor,
    scaler: torch.amp.GradScaler,
    checkpoints: TrainingCheckpoints | None,
) -> tuple[float, bool]:
    """The loss, and whether its gradients overflowed at a loss scale that can still be lowered."""
    kept = f"at step {done + 1}; the model keeps the averaged weights of the {done} steps before"
    if checkpoints is not None and checkpoints.step is not None:
        kept += f", and {checkpoints.directory} the state after step {checkpoints.step}"
    value, norm_value = torch.stack([loss, norm.float()]).tolist()  # one synchronisation for both
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
    if not record.steps:
        return
    recent = record.losses[-20:]
    postfix = f"loss {sum(recent) / len(recent):.4f}"
    if seconds is None:
        bar.set_postfix_str(postfix, refresh=False)
        bar.update(record.steps - bar.n)
    else:
        bar.set_postfix_str(f"{postfix}, {record.steps / record.seconds:.1f} steps/s", refresh=False)
        bar.update(min(record.seconds, seconds) - bar.n)
