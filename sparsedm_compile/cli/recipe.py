"""``sparsedm train``, ``finetune`` and ``quality``: a recipe from data to report."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sparsedm_compile.cli.common import (
    JsonOption,
    ThreadsOption,
    check_place,
    fail,
    file_errors,
    result_only,
    set_up,
    show,
    user_errors,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe, or a path to a .toml file.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the recipe's data files.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of checkpoints, logs and scores; resumed if there.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
TensorBoardOption = Annotated[bool, typer.Option("--tensorboard", help="Log for TensorBoard in place of CSV.")]
RowsOption = Annotated[list[str] | None, typer.Option("--row", help="Only this row; repeatable.")]


def train(
    recipe: RecipeArgument,
    out: OutOption,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    tensorboard: TensorBoardOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Train the dense model of a recipe, or go on where it was stopped."""
    workspace, images = _open(recipe, out, data, threads, device, tensorboard)
    with file_errors(out):
        workspace.dense(images, train=True)
    typer.echo(f"{out / 'dense.safetensors'}")


def finetune(
    recipe: RecipeArgument,
    out: OutOption,
    data: DataOption = None,
    row: RowsOption = None,
    device: DeviceOption = "cpu",
    tensorboard: TensorBoardOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Make the sparse rows of a recipe from its dense model; rows that are there already are kept."""
    workspace, images = _open(recipe, out, data, threads, device, tensorboard)
    with user_errors():
        rows = _rows(workspace, row)
        workspace.dense(images, train=False)
    for one in rows:
        with file_errors(out):
            workspace.row(one, images, make=True)
        typer.echo(f"{one.name}: {out / 'rows' / one.file}.safetensors")


def quality(
    recipe: RecipeArgument,
    out: OutOption,
    data: DataOption = None,
    row: RowsOption = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Only so many seeds; later calls add more.")
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            "--inception", help="Weights file of torch-fidelity's Inception-v3: distances are FIDs then, not FD-CNN."
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also time the rows; run it alone on the machine.")] = False,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the rows that were made (and --row dense), and write report.json and report.html into the folder.

    Under torchrun the processes share the work of drawing samples.
    """
    from sparsedm_compile.distributed import rank_and_world
    from sparsedm_compile.quality.evaluate import OutdatedScore, collect, judge_rows, measure_speed
    from sparsedm_compile.quality.features import inception_features
    from sparsedm_compile.quality.report import render_html
    from sparsedm_compile.recipes.config import DENSE_ROW
    from sparsedm_compile.recipes.workspace import write_json

    workspace, images = _open(recipe, out, data, threads, device)
    with result_only(as_json), file_errors(out), _processes():
        with user_errors():
            rows = _rows(workspace, None if row is None else [name for name in row if name != DENSE_ROW])
            workspace.dense(images, train=False)
            made = tuple(one for one in rows if workspace.has(one))
            known = None if inception is None else inception_features(inception, workspace.device)
        features = known or workspace.features(images)
        try:
            judge_rows(workspace, images, made, features, dense=row is None or DENSE_ROW in row, seeds=seeds)
        except OutdatedScore as error:
            raise fail(str(error)) from error
        first = rank_and_world()[0] == 0
        if speed and first:
            measure_speed(workspace, images, made)
        if not first:
            return
        report, samples = collect(workspace, images, features)
        write_json(out / "report.json", report.to_dict())
        (out / "report.html").write_text(render_html(report, samples))
    show(report, as_json)
    missing = [one.name for one in rows if not workspace.has(one)]
    if missing:
        typer.echo(f"not made yet, hence not in the report: {', '.join(missing)}", err=True)


def _open(recipe: str, out: Path, data: Path | None, threads: int | None, device: str, tensorboard: bool = False):
    import torch

    from sparsedm_compile.recipes.config import load_recipe
    from sparsedm_compile.recipes.data import load_images
    from sparsedm_compile.recipes.rows import create_model
    from sparsedm_compile.recipes.workspace import Workspace

    with user_errors():
        loaded = load_recipe(recipe)
        check_place("--out", out, folder=True)
        set_up(loaded.seed, threads)
        images = load_images(loaded.data, data)
        with torch.device("meta"):
            create_model(loaded, images)  # what does not fit fails here, in one line
        return Workspace(loaded, out, device=_checked(device), tensorboard=tensorboard), images


def _checked(device: str):
    import torch

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {error}") from error


def _rows(workspace, names: list[str] | None):
    return workspace.recipe.rows if names is None else tuple(workspace.recipe.row(name) for name in names)


@contextmanager
def _processes() -> Iterator[None]:
    """The processes that torchrun started, if it did."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
