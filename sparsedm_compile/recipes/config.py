"""A recipe: one TOML file that says data, model, training, the sparse rows to make of it, and how to judge them."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sparsedm_compile.pattern import Pattern

#: How masks are trained: see :class:`RowConfig`.
MASKS = ("sr-ste", "ste", "fixed")
#: What the dense model is called among the rows.
DENSE_ROW = "dense"
SELECTIONS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from.

    Attributes:
        name: ``"digits"`` (scikit-learn's, nothing to download), or ``"npz"``, a file with ``x_train``, ``x_test``
            (uint8, ``(N, H, W)`` or ``(N, H, W, 3)``) and ``y_train``, ``y_test``; or a pair of files
            ``*_train.npz`` and ``*_test.npz`` of JPEG images (keys ``jpeg``, ``offsets``, ``labels``).
        file: of the npz, below the folder that ``--data`` names; ``{split}`` stands for train and test.
    """

    name: str
    file: str = ""

    def __post_init__(self) -> None:
        if self.name not in ("digits", "npz"):
            raise ValueError(f"data.name is {self.name!r}; valid are 'digits' and 'npz'")
        if (self.name == "npz") != bool(self.file):
            raise ValueError("data.file names the images of data.name = 'npz', and of no other")


@dataclass(frozen=True)
class TrainConfig:
    """A run of AdamW.

    Attributes:
        steps: optimizer steps; the same for every row of a recipe that does not name its own.
        amp: ``"bfloat16"``, ``"float16"`` or empty for float32.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 2e-4
    weight_decay: float = 0.03
    warmup_steps: int = 100
    ema_decay: float = 0.999
    amp: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class RowConfig:
    """One sparse (or dense) model to make of the dense checkpoint.

    Attributes:
        name: of the row, and of its files.
        pattern: ``"2:4"``, ...; ``"dense"`` trains the dense model on.
        policy, rules: see :func:`sparsedm_compile.sparsify`.
        select: how masks are chosen before training: ``"magnitude"``, ``"wanda"`` or ``"sparsegpt"``.
        permute: reorder channels first (:func:`sparsedm_compile.permute_channels`).
        macs: a budget, as a share of the dense MACs, for which :func:`sparsedm_compile.plan_for` chooses a pattern for
            each layer among ``candidates``.
        train: whether the row is fine-tuned at all.
        steps: of its fine-tuning, where they are not those of the recipe.
        mask: ``"sr-ste"``; ``"ste"``, without its decay; ``"fixed"``, the first mask for good, as ASP does.
        teacher: whether the dense model teaches (the distillation term of SparseDM). A flexible row without it that
            draws ``"dense"`` is taught by itself at that pattern.
        flexible: patterns drawn at random, one a step, those listed twice twice as often; the row is judged at each.
    """

    name: str
    pattern: str = "2:4"
    policy: str = "sparsedm"
    rules: Mapping[str, str] = field(default_factory=dict)
    select: str = "magnitude"
    permute: bool = False
    macs: float | None = None
    candidates: tuple[str, ...] = ()
    train: bool = True
    steps: int | None = None
    mask: str = "sr-ste"
    teacher: bool = True
    flexible: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (self.pattern, *self.candidates, *self.flexible, *self.rules.values()):
            Pattern.parse(pattern)
        for name, valid in (("mask", MASKS), ("select", SELECTIONS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"row {self.name!r}: {name} is {getattr(self, name)!r}; valid are {', '.join(valid)}")
        if not self.name or self.name != self.name.strip() or "/" in self.name:
            raise ValueError(f"row name {self.name!r} must be text that a file can be called by")
        if self.file == DENSE_ROW:
            raise ValueError(f"row name {self.name!r} is taken: it stands for the dense model that rows are made of")
        if (self.macs is None) == bool(self.candidates):
            raise ValueError(f"row {self.name!r}: macs and candidates go together")
        if (self.flexible or self.steps is not None) and not self.train:
            raise ValueError(f"row {self.name!r} is not trained, so flexible and steps have no meaning")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"row {self.name!r}: steps must be at least 1, got {self.steps}")

    @property
    def file(self) -> str:
        """The stem of the row's files."""
        return "".join(c if c.isalnum() or c in "-." else "-" for c in self.name.lower())


@dataclass(frozen=True)
class QualityConfig:
    """How rows are judged.

    Attributes:
        samples: images drawn for each seed.
        seeds: of the sampling noise; the spread over them is reported.
        solver, steps: see :func:`sparsedm_compile.sample`.
    """

    samples: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)
    solver: str = "dpm-solver++"
    steps: int = 20
    batch: int = 500

    def __post_init__(self) -> None:
        if self.samples < 2 or not self.seeds:
            raise ValueError("quality needs at least 2 samples and 1 seed")


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says.

    Attributes:
        name: of the file.
        model: arguments of :class:`sparsedm_compile.models.UViT`.
        seed: of weights, data order, times and noise.
    """

    name: str
    data: DataConfig
    model: Mapping[str, Any]
    train: TrainConfig
    finetune: TrainConfig
    quality: QualityConfig
    rows: tuple[RowConfig, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        names = [row.file for row in self.rows]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two rows are called {min(twice)!r}")

    def row(self, name: str) -> RowConfig:
        """The row of this name.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(repr(row.name) for row in self.rows)
        raise ValueError(f"recipe {self.name!r} has no row {name!r}; rows are {names}")


_PARTS = {"data": DataConfig, "train": TrainConfig, "finetune": TrainConfig, "quality": QualityConfig}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _packaged().iterdir() if f.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe that comes with the package, by name, or one from a file.

    Raises:
        ValueError: no such recipe, no TOML, an unknown or missing key, or a value out of range; the message says which
            and what is valid.
        FileNotFoundError: the path names no file.
        OSError: the file cannot be read.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.exists():
            raise FileNotFoundError(
                f"recipe {path} does not exist; a recipe is a TOML file, or one of those that come with the package: "
                f"{', '.join(recipe_names())}"
            )
        if path.is_dir():
            raise IsADirectoryError(f"recipe {path} is a folder: name the TOML file in it")
        text, name = path.read_text(), path.stem
    elif name_or_path in recipe_names():
        text, name = (_packaged() / f"{name_or_path}.toml").read_text(), name_or_path
    else:
        raise ValueError(
            f"unknown recipe {name_or_path!r}; valid are {', '.join(recipe_names())}, or a path that ends in .toml"
        )
    try:
        return _recipe(name, tomllib.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe {name_or_path}: {error}") from error


def _packaged():
    return resources.files("sparsedm_compile.recipes")


def _recipe(name: str, table: dict[str, Any]) -> Recipe:
    _check_keys("the recipe", table, {*_PARTS, "model", "rows", "seed"}, required={*_PARTS, "model", "rows"})
    parts = {key: _build(key, cls, table[key]) for key, cls in _PARTS.items()}
    rows = tuple(_build(f"rows[{i}]", RowConfig, row) for i, row in enumerate(table["rows"]))
    return Recipe(name=name, model=table["model"], rows=rows, seed=table.get("seed", 0), **parts)


def _build(where: str, cls: type, table: dict[str, Any]) -> Any:
    fields = dataclasses.fields(cls)
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    _check_keys(where, table, {f.name for f in fields}, required)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def _check_keys(where: str, table: Any, valid: set[str], required: set[str]) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {type(table).__name__}")
    for key in table.keys() - valid:
        close = difflib.get_close_matches(key, valid, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{where} has no key {key!r}{hint}; valid are {', '.join(sorted(valid))}")
    for key in sorted(required - table.keys()):
        raise ValueError(f"{where} lacks {key!r}")
