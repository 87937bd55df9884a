"""Files of benchmark results: one schema for every kind of measurement."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsedm_compile.provenance import provenance

SCHEMA = 1
Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What the rows of a kind have in common.

    Attributes:
        keys: fields that tell one row from another; all files of a folder together hold each combination once.
        measure: the figure that :func:`compare` compares; ``spread`` beside it is its interquartile range, or 0 where
            it was taken once.
        lower_is_better: of the measure.
        slack: relative change that means nothing, on top of what the caller of :func:`compare` tolerates.
        also: further fields that every row has.
        defaults: fields that earlier versions did not write, and what they stood for: read where a row lacks them.
    """

    keys: tuple[str, ...]
    measure: str
    lower_is_better: bool = False
    slack: float = 0.0
    also: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()


#: kind of a file -> its rows. Times are in ms, rates in 1e9/s; ``ratio`` is dense over sparse time, paired.
KINDS = {
    # One layer: the sparse CPU kernel against the fastest of the dense ones.
    "layers": Kind(
        ("layer", "batch", "threads", "dtype", "pattern"),
        "ratio",
        also=("op", "input_rows", "ms", "dense", "dense_ms", "gflops", "dense_gflops", "bytes", "error", "uses"),
        defaults=(("dtype", "float32"),),
    ),
    # One model: the backend against the faster of Inductor and Inductor with freezing.
    "models": Kind(
        ("case", "pattern", "threads"), "ratio", also=("title", "dtype", "ms", "dense", "dense_ms", "error")
    ),
    # One model over a size.
    "scaling": Kind(("sweep", "at", "pattern", "threads"), "ratio", also=("ms", "dense_ms")),
    # What is paid once, or at each call.
    "costs": Kind(("cost", "of", "threads"), "value", lower_is_better=True, also=("unit",)),
    # Error to float64; it changes with the order of a kernel's sums, hence the slack.
    "fidelity": Kind(
        ("case", "layer", "dtype", "pattern"), "error", lower_is_better=True, slack=1.0, also=("kernel", "dense_error")
    ),
}


@dataclass(frozen=True)
class Results:
    """The content of one file.

    Attributes:
        kind: one of :data:`KINDS`.
        rows: field -> value, a row each measurement.
        provenance: see :func:`sparsedm_compile.provenance.provenance`.
        machine: measured of the machine itself: threads -> ``{"gflops", "gbytes"}``; empty where not measured.
        left_out: ``{"what", "why"}`` of each measurement that was not made.
        name: of the file; empty until read or written.
    """

    kind: str
    rows: list[Row]
    provenance: dict[str, Any] = field(default_factory=provenance)
    machine: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    name: str = ""

    def key(self, row: Row) -> tuple:
        """What tells ``row`` from the others of its kind."""
        return tuple(row[key] for key in KINDS[self.kind].keys)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; floats rounded to six digits, more than any timing has."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "provenance": self.provenance,
            "machine": _rounded(self.machine),
            "left_out": self.left_out,
            "rows": _rounded(self.rows),
        }


def write_results(path: Path, results: Results) -> None:
    """Write ``results`` to ``path``, a line each row, replacing an earlier file in one step.

    Raises:
        ValueError: rows that do not fit their kind; nothing is written.
    """
    _check(results, str(path))
    parts = results.to_dict()
    rows = ",\n".join("  " + json.dumps(row) for row in parts.pop("rows"))
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items())
    temporary = path.with_suffix(".part")
    temporary.write_text(f'{{\n{head},\n "rows": [\n{rows}\n ]\n}}\n')
    temporary.replace(path)


def read_results(path: Path) -> Results:
    """Read one file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no results file of this schema, or a row lacks a field; the message names file and field.
    """
    content = _load(path)
    if "kind" not in content:
        raise ValueError(f"{path} holds no benchmark results: there is no 'kind' in it")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')!r}, this version reads {SCHEMA}: measure it again")
    parts = ("kind", "rows", "provenance", "machine", "left_out")
    missing = [part for part in parts if part not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    results = Results(**{part: content[part] for part in parts}, name=path.name)
    if results.kind in KINDS:
        for row in results.rows:
            for name, value in KINDS[results.kind].defaults:
                row.setdefault(name, value)
    _check(results, str(path))
    return results


def read_folder(folder: Path) -> tuple[list[Results], list[str]]:
    """Every results file directly in ``folder``, by name; and the names of the JSON files that are something else.

    Raises:
        OSError: not a folder.
        ValueError: as :func:`read_results`, or no results at all, or one measurement in two files.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder of results")
    found, others = [], []
    for path in sorted(folder.glob("*.json")):
        if "kind" in _load(path):
            found.append(read_results(path))
        else:
            others.append(path.name)
    if not found:
        raise ValueError(f"{folder} holds no benchmark results (*.json); python bench/end_to_end.py writes some")
    _check_unique(found)
    return found, others


def read_path(path: Path) -> list[Results]:
    """One file, or those of a folder: see :func:`read_results` and :func:`read_folder`."""
    return read_folder(path)[0] if path.is_dir() else [read_results(path)]


def of_kind(results: Iterable[Results], kind: str) -> list[Results]:
    """Those of one kind."""
    return [one for one in results if one.kind == kind]


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _check(results: Results, where: str) -> None:
    kind = KINDS.get(results.kind)
    if kind is None:
        raise ValueError(f"{where}: unknown kind {results.kind!r}; there are {', '.join(KINDS)}")
    for number, row in enumerate(results.rows):
        missing = [name for name in (*kind.keys, kind.measure, "spread", *kind.also) if name not in row]
        if missing:
            raise ValueError(f"{where}: row {number} of kind {results.kind!r} lacks {', '.join(missing)}")
        for name in (kind.measure, "spread"):
            value = row[name]
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{where}: row {number}: {name} is {value!r}, not a number of at least 0")
    _check_unique([results])


def _check_unique(found: list[Results]) -> None:
    seen: dict[tuple, str] = {}
    for results in found:
        for row in results.rows:
            key = (results.kind, *results.key(row))
            if key in seen:
                both = f"{seen[key]} and {results.name}" if seen[key] != results.name else results.name or "the rows"
                raise ValueError(f"{both}: {', '.join(map(str, key))} is there twice; remove one")
            seen[key] = results.name


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
