"""``sparsedm sample``: images from a checkpoint, dense or at a pattern."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparsedm_compile.cli.common import (
    CheckpointOption,
    ConfigOption,
    JsonOption,
    ModelArgument,
    PolicyOption,
    RuleOption,
    SeedOption,
    ThreadsOption,
    check_place,
    parse_rules,
    result_only,
    set_up,
    show,
    stderr,
    user_errors,
)
from sparsedm_compile.images import write_grid
from sparsedm_compile.model_spec import DIGITS, LoadedModel, load_model
from sparsedm_compile.models import UViT
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.policy import check_policy
from sparsedm_compile.rendering import RichText
from sparsedm_compile.sampling import sample as draw
from sparsedm_compile.sparsify import sparsify


@dataclass(frozen=True)
class Sampled(RichText):
    """What was drawn, how, and where it lies."""

    model: str
    pattern: str
    count: int
    steps: int
    seconds: float
    picture: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)

    def __rich__(self) -> str:
        return (
            f"{self.picture}: {self.count} images of {self.model} at {self.pattern}, {self.steps} steps, "
            f"{self.seconds:.1f} s, compilation included"
        )


def sample(
    model: ModelArgument = DIGITS,
    pattern: Annotated[str, typer.Option("--pattern", help="dense, 2:4, 1:4, 2:4v4, ...")] = "dense",
    policy: PolicyOption = "sparsedm",
    rule: RuleOption = None,
    checkpoint: CheckpointOption = None,
    config: ConfigOption = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Images to draw.")] = 16,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Calls of the model, by DPM-Solver++.")] = 50,
    label: Annotated[int | None, typer.Option("--label", help="Class of a class-conditional model.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The PNG to write.")] = Path("samples.png"),
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw images from a U-ViT checkpoint in pixel space, compiled, into one PNG."""
    set_up(seed, threads)
    with result_only(as_json), stderr.status("loading") as status:
        with user_errors():
            check_place("--out", out)
            pattern = str(Pattern.parse(pattern))
            loaded = load_model(model, checkpoint=checkpoint, config=config)
            condition = _condition(loaded, checkpoint, label, count)
            rules = parse_rules(rule)
            check_policy(policy)
            if pattern != "dense":
                sparsify(loaded.model, pattern, policy=policy, rules=rules)
            out.parent.mkdir(parents=True, exist_ok=True)
        status.update(f"compiling, then {steps} steps")
        network = loaded.model
        noise = torch.randn(count, network.in_chans, network.img_size, network.img_size)
        start = time.perf_counter()
        images = draw(torch.compile(network, backend="sparsedm"), noise, *condition, steps=steps, clip=1.0)
        seconds = time.perf_counter() - start
        with user_errors():
            write_grid(out, images)
    show(Sampled(loaded.name, pattern, count, steps, seconds, str(out)), as_json)


def _condition(loaded: LoadedModel, checkpoint: Path | None, label: int | None, count: int) -> tuple[torch.Tensor, ...]:
    """Check that this model can be sampled as it is; its class labels, if it takes any.

    Raises:
        ValueError: it cannot; the message says why.
    """
    network = loaded.model
    if not isinstance(network, UViT):
        raise ValueError(f"sample draws from a U-ViT without text, and {loaded.name!r} is {type(network).__name__}")
    if network.in_chans not in (1, 3):
        raise ValueError(f"{loaded.name!r} makes latents of {network.in_chans} channels, which need a decoder")
    if checkpoint is None and ":" not in loaded.name and loaded.name != DIGITS:
        raise ValueError(f"{loaded.name!r} has random weights: pass --checkpoint with the weights to sample from")
    if network.num_classes <= 0:
        if label is not None:
            raise ValueError(f"{loaded.name!r} takes no class: leave --label out")
        return ()
    if label is None:
        return (torch.randint(network.num_classes, (count,)),)
    if not 0 <= label < network.num_classes:
        raise ValueError(f"label {label} is not in [0, {network.num_classes})")
    return (torch.full((count,), label),)
