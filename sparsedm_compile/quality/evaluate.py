"""Judging all rows of a recipe's folder; what was judged already is kept."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsedm_compile.benchmarking import bench_model
from sparsedm_compile.distributed import on_first_process, rank_and_world
from sparsedm_compile.layers import layer_pattern, sparse_layers
from sparsedm_compile.provenance import provenance
from sparsedm_compile.quality.distances import ReferenceSet
from sparsedm_compile.quality.features import Features, weights_sha256
from sparsedm_compile.quality.judge import Score, judge
from sparsedm_compile.quality.report import QualityReport
from sparsedm_compile.recipes.config import DENSE_ROW, RowConfig
from sparsedm_compile.recipes.data import ImageData
from sparsedm_compile.recipes.workspace import Workspace, write_json
from sparsedm_compile.sparsify import set_pattern


class OutdatedScore(ValueError):
    """A score file is of other settings, weights or features than those at hand."""


def judge_rows(
    workspace: Workspace,
    data: ImageData,
    rows: tuple[RowConfig, ...],
    features: Features,
    *,
    dense: bool = True,
    seeds: int | None = None,
    progress: bool = True,
) -> None:
    """Judge the dense model and ``rows`` at the seeds that are missing, and write a score file for each.

    Several processes may judge different rows of one folder at the same time.

    Args:
        features: what images are compared by; scores of other features lie in a folder of their own.
        dense: whether to judge the dense model too.
        seeds: how many of the recipe's seeds; all unless given. A later call adds the others.

    Raises:
        FileNotFoundError: a row was never made.
        OutdatedScore: a score file of other settings than the recipe's, of another model or other features.
    """
    quality = workspace.recipe.quality
    wanted = quality.seeds[:seeds]
    reference = ReferenceSet(features, data.test)
    _scores(workspace, features).mkdir(exist_ok=True)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # every pattern is a graph

    def score(name: str, file: str, load: Callable[[], nn.Module]) -> None:
        path = _scores(workspace, features) / f"{file}.json"
        known = on_first_process(lambda: _read_score(path) if path.exists() else None)
        model = load()
        if known is not None:
            now = {
                "samples": quality.samples,
                "solver": quality.solver,
                "steps": quality.steps,
                "weights_sha256": weights_sha256(model),
                "features_sha256": reference.extractor.sha256,
            }
            _check_same(path, known, now)
        missing = tuple(seed for seed in wanted if known is None or seed not in known.seeds)
        if not missing:
            return
        result, shown = judge(
            name,
            model,
            reference,
            data.test,
            seeds=missing,
            samples=quality.samples,
            solver=quality.solver,
            steps=quality.steps,
            batch=quality.batch,
            pattern=_patterns_of(model),
            progress=progress,
        )
        if rank_and_world()[0] > 0:
            return
        if known is None:
            save_file({"images": shown.contiguous()}, path.with_suffix(".safetensors"))
        else:
            result = known.merged(result)
        write_json(path, {**result.to_dict(), "provenance": provenance()})

    if dense:
        score(DENSE_ROW, DENSE_ROW, lambda: workspace.dense(data, train=False))
    for row in rows:
        for name, file, pattern in _variants(row):
            score(name, file, functools.partial(_load, workspace, row, data, pattern))


def _check_same(path: Path, known: Score, now: dict[str, object]) -> None:
    for name, value in now.items():
        if getattr(known, name) != value:
            raise OutdatedScore(
                f"{path} was judged with {name} = {getattr(known, name)}, and now it is {value}: delete the file to "
                "judge the row anew, or use another folder"
            )


def _load(workspace: Workspace, row: RowConfig, data: ImageData, pattern: str | None) -> nn.Module:
    model = workspace.row(row, data, make=False)
    if pattern is not None:
        set_pattern(model, pattern)
    return model


def _variants(row: RowConfig) -> list[tuple[str, str, str | None]]:
    """Name, file and pattern of what is judged of a row: a flexible one at each of its patterns."""
    if not row.flexible:
        return [(row.name, row.file, None)]
    return [(f"{row.name}, at {p}", f"{row.file}-at-{p.replace(':', '-')}", p) for p in dict.fromkeys(row.flexible)]


def _patterns_of(model: nn.Module) -> str:
    patterns = {str(layer_pattern(layer)) for layer in sparse_layers(model).values()}
    return ", ".join(sorted(patterns)) or "dense"


def _read_score(path: Path) -> Score:
    values = json.loads(path.read_text())
    return Score.from_dict({key: value for key, value in values.items() if key != "provenance"})


def _scores(workspace: Workspace, features: Features) -> Path:
    return workspace.folder / ("scores-fid" if features.name == "FID" else "scores")


def measure_speed(
    workspace: Workspace, data: ImageData, rows: tuple[RowConfig, ...], *, batch: int = 64, seconds: float = 10.0
) -> None:
    """Time each distinct plan of the rows against the faster dense compilation and write ``scores/speed.json``.

    Run it alone on the machine. Speed does not depend on how a row was trained, so rows of one pattern share a figure.
    """
    dense = workspace.dense(data, train=False)
    inputs = tuple(t.to(workspace.device) for t in (data.test[:batch], torch.full((batch,), 500.0)))
    path = workspace.folder / "scores" / "speed.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text())["runs"] if path.exists() else []
    timed: dict[str, dict] = {json.dumps(run["plan"], sort_keys=True): run for run in known}
    for row in rows:
        for name, _, pattern in _variants(row):
            model = _load(workspace, row, data, pattern)
            plan = {layer: str(layer_pattern(module)) for layer, module in sparse_layers(model).items()}
            if set(plan.values()) <= {"dense"}:
                continue
            key = json.dumps(plan, sort_keys=True)
            if key not in timed:
                report = bench_model(
                    dense, inputs, patterns=["2:4"], policy=row.policy, rules=plan, seconds=seconds, name=name
                )
                timed[key] = report.to_dict() | {"plan": plan, "names": []}
            if name not in timed[key]["names"]:
                timed[key]["names"].append(name)
    write_json(path, {"runs": list(timed.values()), "provenance": provenance()})


def collect(workspace: Workspace, data: ImageData, features: Features) -> tuple[QualityReport, dict[str, Tensor]]:
    """The report of everything judged so far, and samples by row name.

    Raises:
        FileNotFoundError: the dense model was not judged.
        OutdatedScore: rows that were not judged alike.
    """
    scores, samples = [], {}
    sources = {}
    for file in (DENSE_ROW, *(file for row in workspace.recipe.rows for _, file, _ in _variants(row))):
        path = _scores(workspace, features) / f"{file}.json"
        if not path.exists():
            if file == DENSE_ROW:
                raise FileNotFoundError(f"{path} does not exist: the dense model must be judged first")
            continue
        sources["scores"] = json.loads(path.read_text())["provenance"]
        scores.append(_read_score(path))
        _check_same(path, scores[-1], {"features_sha256": features.sha256, "samples": scores[0].samples})
        samples[scores[-1].name] = load_file(path.with_suffix(".safetensors"))["images"]
    speedups = {}
    if (speed := workspace.folder / "scores" / "speed.json").exists():
        timed = json.loads(speed.read_text())
        sources["speed"] = timed["provenance"]
        for run in timed["runs"]:
            row = run["patterns"][0]
            speedups |= dict.fromkeys(run["names"], (row["speedup"], row["spread"]))
    report = QualityReport(
        title=f"sparsedm quality, recipe {workspace.recipe.name}",
        metric=features.name,
        features_sha256=features.sha256,
        classifier_accuracy=features.accuracy,
        floor=_floor(workspace, features, data),
        rows=tuple(scores),
        speedups=speedups,
        provenance=sources,
    )
    return report, samples


def _floor(workspace: Workspace, features: Features, data: ImageData) -> float:
    """Distance of training images to the test images, as many as there are samples."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    chosen = data.train[order[: workspace.recipe.quality.samples]]
    return ReferenceSet(features, data.test).distances(chosen).frechet
