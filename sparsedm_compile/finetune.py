"""Fine-tuning a sparsified diffusion model with its dense original as teacher: the method of SparseDM."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsedm_compile.distributed import rank_and_world, share_of
from sparsedm_compile.ema import EMA
from sparsedm_compile.fixed_mask import FixedMask
from sparsedm_compile.layers import layer_pattern, sparse_layers
from sparsedm_compile.modes import evaluating
from sparsedm_compile.noise import VPSDE, NoiseProcess
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.pattern import DENSE, Pattern
from sparsedm_compile.planning import unwrap
from sparsedm_compile.schedules import DrawnPatterns, PatternSchedule, StagedPatterns
from sparsedm_compile.sparsify import get_plan, set_pattern, use_pattern
from sparsedm_compile.srste import SRSTE
from sparsedm_compile.training import TrainingRecord, check_limits, train
from sparsedm_compile.training_log import TrainingLog


def distillation_loss(
    prediction: Tensor,
    noise: Tensor,
    teacher_prediction: Tensor | None,
    *,
    denoising_weight: float = 1.0,
    distillation_weight: float = 0.1,
) -> Tensor:
    """``denoising_weight * MSE(noise, prediction) + distillation_weight * MSE(teacher_prediction, prediction)``.

    A weight of 0 gives SparseDM's two ablations: denoising only, and teacher only.

    Args:
        prediction: the student's noise, any shape.
        noise: what was added to the data; the shape of ``prediction``.
        teacher_prediction: the teacher's noise for the same ``x_t``; gets no gradient. May be None at
            ``distillation_weight=0``.

    Returns:
        A float32 scalar; half-precision predictions are compared in float32.

    Raises:
        ValueError: shapes that differ (they would broadcast silently), a teacher that is missing, weights that are
            negative or both 0.

    Source: SparseDM, arXiv 2404.10445, and its official code (weights 1 and 0.1).
    """
    _check_weights(denoising_weight, distillation_weight, teacher_prediction)
    loss = prediction.new_zeros((), dtype=torch.float32)
    for name, weight, target in (
        ("noise", denoising_weight, noise),
        ("teacher_prediction", distillation_weight, teacher_prediction),
    ):
        if weight == 0:
            continue
        if target.shape != prediction.shape:
            raise ValueError(f"{name} has shape {tuple(target.shape)}, prediction {tuple(prediction.shape)}")
        loss = loss + weight * F.mse_loss(prediction.float(), target.detach().float())
    return loss


def _check_weights(denoising_weight: float, distillation_weight: float, teacher: object | None) -> None:
    if not (denoising_weight >= 0 and distillation_weight >= 0 and denoising_weight + distillation_weight > 0):
        raise ValueError(
            "denoising_weight and distillation_weight must be 0 or more, and not both 0; "
            f"got {denoising_weight} and {distillation_weight}"
        )
    if teacher is None and distillation_weight > 0:
        raise ValueError("the distillation term needs a teacher: pass one, or distillation_weight=0")


def finetune(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    process: NoiseProcess | None = None,
    denoising_weight: float = 1.0,
    distillation_weight: float = 0.1,
    patterns: PatternSchedule | Sequence[str | Pattern] | None = None,
    fixed_mask: bool = False,
    srste_decay: float = 2e-4,
    learning_rate: float = 2e-4,
    weight_decay: float = 0.03,
    warmup_steps: int = 100,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.9999,
    ema_warmup: bool = True,
    amp: str | None = None,
    compile: bool = False,
    checkpoint_dir: Path | str | None = None,
    checkpoint_every: int = 1000,
    log: TrainingLog | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingRecord:
    """Fine-tune a sparsified model in place, with its dense original as teacher.

    Student and average start from the dense weights that the model holds. Each step draws times and noise, lets
    student and teacher predict the noise from the same ``x_t``, and takes the :func:`distillation_loss`; gradients pass
    straight through the masks, with the decay of :class:`SRSTE`. At the end the model holds the averaged dense weights,
    which its layers mask. Each part can be used alone in another loop.

        teacher = copy.deepcopy(model)
        sdm.sparsify(model, "2:4")
        sdm.finetune(model, teacher, loader, steps=10_000)

    One checkpoint for several patterns, dense among them, which is then the teacher, in place:

        sdm.finetune(model, None, loader, steps=10_000, patterns=["dense", "2:4", "1:4"])

    Under torchrun, ``model`` may be wrapped in ``DistributedDataParallel`` or, once it is sparsified, spread by
    ``fully_shard`` (FSDP2); each process passes its own equal part of every batch. Losses and weights are then those of
    one process with the whole batch, the parts in the order of the ranks, up to rounding.

    Args:
        model: a sparsified noise predictor, called as ``process.predict_noise`` says.
        teacher: the dense model, called alike; not changed. May be None at ``distillation_weight=0``, and where
            ``patterns`` hold ``"dense"``: the teacher is then the model itself at that pattern, in eval mode and
            without gradients.
        batches: of clean data ``(B, ...)``, or of ``(data, *condition)``; moved to the device of ``model``, and gone
            through again and again.
        steps, seconds, warmup_steps, max_grad_norm, progress: see :func:`train`.
        process: the noise process that the model was trained on; the default is that of U-ViT's pixel models,
            :class:`SchedulerProcess` takes a diffusers scheduler.
        denoising_weight, distillation_weight: of the two terms of the loss.
        patterns: None trains the plan that the model has. A sequence is drawn from at each step, see
            :class:`DrawnPatterns`; the plan comes back afterwards. :class:`StagedPatterns` is progressive; the model
            is left at its last pattern. Every layer that ``sparsify`` selected takes the pattern of the step.
        fixed_mask: hold the first masks, see :class:`FixedMask`, in place of SR-STE; what they drop is lost from step 1
            on.
        srste_decay: see :class:`SRSTE`; 0 is the plain straight-through estimator.
        learning_rate, weight_decay: of AdamW.
        ema_decay, ema_warmup: see :class:`EMA`.
        amp: ``"bfloat16"`` or ``"float16"`` runs student and teacher under autocast; float16 scales the loss. Weights,
            masks, loss and average stay in the dtype of the model.
        compile: train through ``torch.compile(model, backend="sparsedm")``; pays from some hundred steps on. Each
            pattern is a graph of its own.
        checkpoint_dir, checkpoint_every: the run is saved and goes on after an interruption, see :func:`train`.
        log: see :func:`train`.
        seed: of times, noise and drawn patterns; the order of the data is the caller's.

    Returns:
        Steps, seconds and the loss of each step.

    Raises:
        ValueError: the model is not sparse; the teacher is missing, sparse, or shares weights with the model; a number
            out of range; a pattern that no layer takes; options that exclude each other; no data; a checkpoint that is
            damaged, or of a run with another model, plan or other arguments.
        TypeError: not a module.
        OSError: see :func:`train`.
        FloatingPointError: the loss is not finite; the model keeps the averaged weights of the steps before.

    Source: SparseDM, arXiv 2404.10445; the defaults are those of its official code, but for the two warm-ups.
    """
    layers = sparse_layers(unwrap(model))
    if not layers:
        raise ValueError("model has no sparse layers: call sparsify(model, pattern) first")
    if patterns is not None and not isinstance(patterns, PatternSchedule):
        patterns = DrawnPatterns(tuple(patterns), seed)
    _check_patterns(patterns, layers, fixed_mask)
    teaches_itself = teacher is None and patterns is not None and DENSE in patterns.patterns and denoising_weight > 0
    _check_weights(denoising_weight, distillation_weight, model if teaches_itself else teacher)
    if teacher is not None and distillation_weight > 0:
        _check_teacher(model, teacher)
    if amp not in (None, "bfloat16", "float16"):
        raise ValueError(f"amp must be 'bfloat16', 'float16' or None, got {amp!r}")
    check_limits(steps, seconds, warmup_steps, max_grad_norm, checkpoint_every)
    process = process or VPSDE()
    settings = {
        "plan": {name: layer.pattern for name, layer in layers.items()},
        "process": repr(process),
        "denoising_weight": denoising_weight,
        "distillation_weight": distillation_weight,
        "patterns": repr(patterns),
        "fixed_mask": fixed_mask,
        "srste_decay": srste_decay,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "ema_decay": ema_decay,
        "ema_warmup": ema_warmup,
        "amp": amp,
        "seed": seed,
    }
    device = next(iter(layers.values())).weight.device
    generator = torch.Generator(device).manual_seed(seed)
    student = torch.compile(model, backend="sparsedm") if compile else model

    def predict(network: nn.Module, x_t: Tensor, t: Tensor, condition: Sequence[Tensor]) -> Tensor:
        # A context for each call: autocast keeps the casts of weights until it ends, and those that a teacher in place
        # made without gradients must not reach the student.
        with torch.autocast(device.type, getattr(torch, amp)) if amp else nullcontext():
            return process.predict_noise(network, x_t, t, *condition)

    @torch.no_grad()
    def teach(x_t: Tensor, t: Tensor, condition: Sequence[Tensor]) -> Tensor:
        if teacher is not None:
            return predict(teacher, x_t, t, condition)
        with evaluating(student), use_pattern(model, DENSE):
            return predict(student, x_t, t, condition)

    def loss(batch: Tensor | Sequence[Tensor]) -> Tensor:
        clean, *condition = (t.to(device) for t in ((batch,) if isinstance(batch, Tensor) else batch))
        everyone = clean.shape[0] * rank_and_world()[1]
        t = share_of(process.sample_times(everyone, device=device, generator=generator))
        noise = torch.randn(everyone, *clean.shape[1:], dtype=clean.dtype, device=device, generator=generator)
        noise = share_of(noise)
        x_t = process.perturb(clean, t, noise)
        # A model at its dense pattern would be taught what it says already.
        taught = distillation_weight > 0 and not (teaches_itself and not get_plan(model).patterns())
        target = teach(x_t, t, condition) if taught else None
        prediction = predict(student, x_t, t, condition)
        return distillation_loss(
            prediction,
            noise,
            target,
            denoising_weight=denoising_weight,
            distillation_weight=distillation_weight if taught else 0,
        )

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=weight_decay
    )
    ema = EMA(model, ema_decay, warmup=ema_warmup)
    with ExitStack() as undo:
        if teacher is not None:
            undo.enter_context(evaluating(teacher))
        if patterns is not None:
            undo.enter_context(use_pattern(model, patterns(0)))
        if fixed_mask:
            rule = undo.enter_context(_fixed_mask(optimizer, model, ema))
        else:
            rule = SRSTE(optimizer, model, srste_decay)
            undo.callback(rule.remove)
        record = train(
            model,
            optimizer,
            loss,
            batches,
            ema=ema,
            steps=steps,
            seconds=seconds,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            before_step=None if patterns is None else lambda step: set_pattern(model, patterns(step)),
            scaler=torch.amp.GradScaler(device.type) if amp == "float16" else None,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            stateful={"noise": generator, **({"fixed_mask": rule} if fixed_mask else {})},
            settings=settings,
            log=log,
            progress=progress,
            description="fine-tune",
        )
    if isinstance(patterns, StagedPatterns):
        set_pattern(model, patterns(record.steps - 1))
    return record


@contextmanager
def _fixed_mask(optimizer: torch.optim.Optimizer, model: nn.Module, ema: EMA) -> Iterator[FixedMask]:
    """:class:`FixedMask` for the block. What it drops comes back if the block fails before ``ema`` saw a step."""
    weights = [layer.weight for layer in sparse_layers(unwrap(model)).values()]
    dense = [weight.detach().clone() for weight in weights]
    rule = FixedMask(optimizer, model)
    ema.restart(model)  # not from the weights that were just dropped
    try:
        yield rule
    except BaseException:
        if ema.updates == 0:
            with torch.no_grad():
                for weight, before in zip(weights, dense, strict=True):
                    weight.copy_(before)
        raise
    finally:
        rule.remove()


def _check_patterns(patterns: PatternSchedule | None, layers: Mapping[str, nn.Module], fixed_mask: bool) -> None:
    if patterns is None:
        return
    if fixed_mask:
        raise ValueError("fixed_mask=True holds one mask and patterns change it: leave one of them out")
    for pattern in set(patterns.patterns):
        shapes = [(tuple(layer.weight.shape), getattr(layer, "groups", 1)) for layer in layers.values()]
        refusals = {pattern.refusal(*shape) for shape in shapes}
        if None not in refusals:
            raise ValueError(f"no layer of the model takes {pattern}: {'; '.join(sorted(refusals))}")


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    students = {id(parameter) for parameter in model.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in students]
    if shared:
        raise ValueError(
            f"teacher shares weights with the model ({shared[0]!r}, {len(shared)} in all) and would be trained too; "
            "make it by copy.deepcopy(model) before sparsify"
        )
    sparse = [name for name, layer in sparse_layers(unwrap(teacher)).items() if not layer_pattern(layer).is_dense]
    sparse += packed_layers(unwrap(teacher))
    if sparse:
        raise ValueError(
            f"teacher is sparse itself ({sparse[0]!r}, {len(sparse)} layers in all): make it by copy.deepcopy(model) "
            "before sparsify, or call set_pattern(teacher, 'dense')"
        )
