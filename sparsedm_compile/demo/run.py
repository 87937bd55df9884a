"""The demo end to end: load, sparsify, fine-tune, compile, sample, measure."""

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from sparsedm_compile.benchmarking import BenchReport, bench_model
from sparsedm_compile.demo.digits import TRAIN_IMAGES, batches, load_digits, load_model
from sparsedm_compile.demo.frechet import pixel_frechet_distance
from sparsedm_compile.demo.requirements import check_requirements
from sparsedm_compile.finetune import finetune
from sparsedm_compile.images import sample_figure
from sparsedm_compile.macs import MacsReport, count_macs
from sparsedm_compile.models import create_uvit, example_inputs
from sparsedm_compile.noise import VPSDE
from sparsedm_compile.rendering import RichText
from sparsedm_compile.sampling import sample
from sparsedm_compile.sparsify import sparsify

PATTERN, POLICY = "2:4", "sparsedm"
_STAGES = ("sample the dense model", "sample one-shot", "fine-tune", "sample fine-tuned", "time U-ViT-S/2", "write")


@dataclass(frozen=True)
class ModelFigures:
    """One row of the table.

    Attributes:
        name: ``"dense"``, ``"one-shot 2:4"`` or ``"fine-tuned 2:4"``.
        macs: of the linear and convolution layers, for one image, zeros skipped.
        weight_bytes: of all parameters in float32, the sparse ones packed.
        distance: pixel Fréchet distance of the samples to the test images.
        denoising_loss: mean squared error of the predicted noise on the test images, same times and noise for all.
    """

    name: str
    macs: int
    weight_bytes: int
    distance: float
    denoising_loss: float


@dataclass(frozen=True)
class DemoResult(RichText):
    """What the demo found; prints as a table.

    Attributes:
        rows: dense, one-shot, fine-tuned.
        floor: pixel Fréchet distance of the training images to the test images: what a perfect model would reach with
            as many samples.
        samples: images drawn from each model.
        finetune_steps, finetune_seconds: of the fine-tuning.
        speed: forward times of a full-size model, or None if they were left out.
        seconds: of the whole demo.
        picture, report: the files written.
    """

    rows: tuple[ModelFigures, ...]
    floor: float
    samples: int
    finetune_steps: int
    finetune_seconds: float
    speed: BenchReport | None
    seconds: float
    picture: Path
    report: Path

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return {**asdict(self), "picture": str(self.picture), "report": str(self.report)}

    def __rich__(self) -> Group:
        table = Table(title="SparseDM on handwritten digits")
        table.add_column("model")
        for column in ("MACs per image", "weights", "pixel Fréchet distance", "denoising loss"):
            table.add_column(column, justify="right")
        for row in self.rows:
            cells = f"{row.macs / 1e6:.2f} M", f"{row.weight_bytes / 1e6:.2f} MB"
            table.add_row(row.name, *cells, f"{row.distance:.3f}", f"{row.denoising_loss:.4f}")
        table.add_row("real (train)", "", "", f"{self.floor:.3f}", "", style="dim")
        lines = [
            f"distances from {self.samples} samples to the test images; fine-tuned for {self.finetune_steps} steps in "
            f"{self.finetune_seconds:.0f} s. A demonstration on 8 x 8 pixels: not evidence of quality on larger images."
        ]
        last = f"samples: {self.picture}; figures: {self.report}; {self.seconds:.0f} s in all"
        return Group(table, *lines, *([self.speed] if self.speed is not None else []), last)


def run_demo(
    output_dir: Path | str = "demo-output",
    *,
    seconds: float = 60.0,
    seed: int = 0,
    samples: int = TRAIN_IMAGES,
    sampling_steps: int = 20,
    speed: bool = True,
    progress: bool = True,
) -> DemoResult:
    """Make a pretrained U-ViT 2:4 sparse, fine-tune it, compile it, and compare its samples with the dense model's.

    Everything is local: the images are scikit-learn's digits, the dense checkpoint lies in the package.

    Args:
        output_dir: gets ``samples.png`` and ``demo.json``; made if it does not exist.
        seconds: of fine-tuning. How many steps that is depends on the machine, and so do the figures.
        seed: of the sampling noise and of the fine-tuning.
        samples: images to draw from each model. Distances depend on it; the default is the number of training images,
            which makes the floor comparable.
        sampling_steps: of DPM-Solver++.
        speed: also time one forward pass of U-ViT-S/2, which takes a minute or two of compiling.
        progress: show progress bars.

    Raises:
        ImportError: scikit-learn or matplotlib is missing (the extra ``demo``).
        ValueError: fewer than 2 samples or sampling steps, ``seconds`` not positive.
    """
    for name, value in (("samples", samples), ("sampling_steps", sampling_steps)):
        if value < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    check_requirements()
    start = time.perf_counter()
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    train_images, test_images = load_digits()
    teacher = load_model()
    student = copy.deepcopy(teacher)
    sparsify(student, PATTERN, policy=POLICY)
    compiled = torch.compile(student, backend="sparsedm")
    noise = torch.randn(samples, *test_images.shape[1:], generator=torch.Generator().manual_seed(seed))
    macs = {model: count_macs(model, noise[:1], torch.zeros(1)) for model in (teacher, student)}
    pictures: dict[str, Tensor] = {}
    rows: list[ModelFigures] = []

    def measure(name: str, model: nn.Module, report: MacsReport) -> None:
        drawn = sample(model, noise, steps=sampling_steps, clip=1.0, progress=progress).clamp(-1, 1)
        pictures[name] = drawn
        distance = pixel_frechet_distance(drawn, test_images)
        # At the batch size of the sampling, so that the compiled model is compiled once.
        loss = _denoising_loss(model, test_images, samples)
        rows.append(ModelFigures(name, report.sparse, report.packed_bytes, distance, loss))

    with _Stages(progress) as stages:
        stages.next()
        measure("dense", teacher, macs[teacher])
        stages.next()
        measure(f"one-shot {PATTERN}", compiled, macs[student])
        stages.next()
        run = finetune(
            student,
            teacher,
            batches(train_images, seed=seed),
            seconds=seconds,
            warmup_steps=20,
            seed=seed,
            progress=progress,
        )
        stages.next()
        # The compiled model of before: its packed weights are renewed, its graph is not.
        measure(f"fine-tuned {PATTERN}", compiled, macs[student])
        stages.next()
        times = _bench_full_size() if speed else None
        stages.next()
        picture, report = output_dir / "samples.png", output_dir / "demo.json"
        sample_figure(pictures).savefig(picture, dpi=120)
        result = DemoResult(
            rows=tuple(rows),
            floor=pixel_frechet_distance(train_images, test_images),
            samples=samples,
            finetune_steps=run.steps,
            finetune_seconds=run.seconds,
            speed=times,
            seconds=time.perf_counter() - start,
            picture=picture,
            report=report,
        )
        report.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return result


class _Stages:
    """A bar over the parts of the demo, above the bars of the parts themselves."""

    def __init__(self, progress: bool) -> None:
        self._names = iter(_STAGES)
        layout = "demo, part {n} of {total}: {desc} [{elapsed}]"
        self._bar = tqdm(total=len(_STAGES), bar_format=layout, disable=not progress, leave=False)

    def next(self) -> None:
        self._bar.set_description_str(next(self._names), refresh=False)
        self._bar.update(1)

    def __enter__(self) -> "_Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@torch.no_grad()
def _denoising_loss(model: nn.Module, images: Tensor, batch: int) -> float:
    process, generator = VPSDE(), torch.Generator().manual_seed(0)
    clean = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    t = process.sample_times(len(clean), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    prediction = process.predict_noise(model, process.perturb(clean, t, noise), t)
    return (prediction - noise).square().mean().item()


def _bench_full_size() -> BenchReport:
    model = create_uvit("uvit-s/2").eval()  # random weights, which change no time
    inputs = example_inputs(model, batch=4)
    return bench_model(model, inputs, patterns=[PATTERN], policy=POLICY, seconds=15, name="uvit-s/2")
