"""What the commands share: their arguments, one-line errors, and a stdout that holds the result alone."""

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console

from sparsedm_compile.policy import POLICIES

#: Progress goes here, so that stdout can be piped.
stderr = Console(stderr=True)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset (uvit-s/2, digits, ...), diffusers:ClassName, or package.module:factory for a function that "
        "returns a model or (model, inputs).",
    ),
]
PatternOption = Annotated[str, typer.Option("--pattern", help="2:4, 1:4, 4:8, 2:4v4, ... or dense.")]
PolicyOption = Annotated[str, typer.Option("--policy", help=f"Which layers are sparse: {', '.join(POLICIES)}.")]
RuleOption = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="GLOB=PATTERN", help="Overrides the policy; repeatable, the last match wins."),
]
BatchOption = Annotated[int | None, typer.Option("--batch", help="Batch size of the inputs; 1 unless given.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="JSON with constructor arguments (a diffusers config.json).")
]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights: .safetensors, or a state dict saved by torch.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of torch.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of random weights, inputs and noise.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]


class Report(Protocol):
    """A result that prints as a table and turns into a dict."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""


def fail(message: str) -> typer.Exit:
    """Say what is wrong in one line on stderr; raise the result to end with exit status 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return typer.Exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Input that the library refuses ends the command with its message, not with a traceback.

    Put it around what checks input, not around what computes: there an exception is a bug and should look like one.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise fail(_told(error)) from error


@contextmanager
def file_errors(place: Path) -> Iterator[None]:
    """Files that cannot be written at ``place`` (no permission, a full disk) end the command in one line.

    For what computes and writes what it computed: any other exception, also one over another file, such as a compiler
    that is missing, is a bug and looks like one.

    Args:
        place: the file that is written, or the folder that is filled.
    """
    try:
        yield
    except OSError as error:
        of_place = error.filename is not None and _is_of(Path(error.filename), place)
        if not of_place and error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a write to a full disk names no file
            raise
        raise fail(_told(error)) from error


def _is_of(file: Path, place: Path) -> bool:
    """Whether a file is ``place``, what it is written to first, in it, or on the way to it."""
    file, place = file.absolute(), place.absolute()
    return file.with_suffix("") == place.with_suffix("") or place in file.parents or file in place.parents


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:  # as the system words it
        return f"{error.filename}: {error.strerror}; choose another path, or see to this one"
    return str(error)


def check_place(option: str, path: Path, *, folder: bool = False) -> None:
    """Refuse a place for results before anything is computed for it. Nothing is made there yet.

    Args:
        option: what the user wrote it behind.
        path: of the file to write or, with ``folder``, of the folder to fill.

    Raises:
        OSError: a folder where a file should be or the reverse, or no permission to write.
    """
    if path.is_dir() and not folder:
        raise IsADirectoryError(f"{option} {path} is a folder: name a file, in it or elsewhere")
    if path.exists() and not path.is_dir() and folder:
        raise NotADirectoryError(f"{option} {path} is a file: name a folder")
    standing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if standing != path and not standing.is_dir():
        raise NotADirectoryError(f"{option} {path}: {standing} is a file, not a folder; choose another path")
    # A file is written beside its place and then moved there, so its folder must be writable as well.
    for place in {standing, standing if standing.is_dir() else standing.absolute().parent}:
        if not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
            raise PermissionError(
                f"{option} {path} cannot be written: no permission to write to {place}; choose another path, or change "
                "the permissions"
            )


@contextmanager
def result_only(as_json: bool) -> Iterator[None]:
    """With ``--json``, what libraries and factories print goes to stderr."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def set_up(seed: int, threads: int | None = None) -> None:
    """Seed torch, set its threads, and let factories be found in the working directory, as ``python -m`` would."""
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    # Last, because a folder may hold a "kernels" that diffusers would take for the package of that name.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def parse_rules(rules: Sequence[str] | None) -> dict[str, str]:
    """``["*.attn.*=2:4v4"]`` -> ``{"*.attn.*": "2:4v4"}``.

    Raises:
        ValueError: an entry that is no ``GLOB=PATTERN``.
    """
    parsed = {}
    for rule in rules or ():
        glob, equals, pattern = rule.rpartition("=")
        if not (glob and equals and pattern):
            raise ValueError(f"rule {rule!r} is not GLOB=PATTERN, such as '*.attn.*=2:4v4' or 'decoder_pred=dense'")
        parsed[glob] = pattern
    return parsed


def show(report: Report, as_json: bool) -> None:
    """Print a result as JSON, or as a table: of the terminal's width, or of its own where stdout is none."""
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    elif sys.stdout.isatty():
        Console().print(report)
    else:
        sys.stdout.write(f"{report}\n")
