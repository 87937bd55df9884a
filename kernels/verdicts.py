"""Verdicts of the measured choice and their store on disk."""

import json
import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch

from sparsedm_compile.cache import cache_directory
from sparsedm_compile.provenance import cpu_model

try:
    import fcntl
except ImportError:  # Windows; there two writers at once may lose an entry, which costs a measurement
    fcntl = None

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Which kernel runs a layer, and why.

    Attributes:
        kernel: name of the kernel, or ``"dense"`` for torch's own operator.
        reason: in words.
        sparse_seconds, dense_seconds: medians of one call of the fastest of each kind, where measured.
        ratio: median of dense over sparse, timed in turn; above one, sparse is faster.
        settled: whether the machine was quiet enough for the verdict to be remembered on disk.
        measured_at: shape of the input that was timed; empty where none was. A verdict serves inputs of like size too.
        native_seconds: median of one call of torch's own operator, where measured; never below ``dense_seconds``.
    """

    kernel: str
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    ratio: float | None = None
    settled: bool = True
    measured_at: tuple[int, ...] = ()
    native_seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "measured_at", tuple(self.measured_at))  # JSON makes it a list


class VerdictStore:
    """Verdicts by key, in memory and in one JSON file for each kind of machine and torch version.

    The file is a convenience: one that is damaged, of another format or not writable costs a measurement, never an
    error.
    """

    def __init__(self) -> None:
        self._verdicts: dict[str, Verdict] = {}
        self._loaded_from: Path | None = None
        self._warned = False

    @cached_property
    def _machine(self) -> str:
        described = "|".join((platform.machine(), cpu_model(), torch.__version__, *_gpus()))
        return sha256(described.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """The file; follows ``$SPARSEDM_CACHE_DIR``."""
        return cache_directory() / f"verdicts-{self._machine}.json"

    def get(self, key: str) -> Verdict | None:
        """The verdict remembered under ``key``, if any."""
        self._load()
        return self._verdicts.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Remember a verdict, a settled one also on disk, keeping what other processes wrote meanwhile."""
        if not verdict.settled:
            self._verdicts[key] = verdict
            return
        try:
            with self._locked():
                self._loaded_from = None
                self._load()
                self._verdicts[key] = verdict
                self._write()
        except OSError as error:
            self._verdicts[key] = verdict
            if not self._warned:
                _log.warning("kernel choices are not remembered: %s", error)
            self._warned = True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Other processes wait, so that none overwrites what another has just added."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            yield

    def _write(self) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump({k: asdict(v) for k, v in self._verdicts.items() if v.settled}, file, indent=1)
        Path(temporary).replace(self.path)

    def _load(self) -> None:
        path = self.path
        if self._loaded_from == path:
            return
        if self._loaded_from is not None:
            self._verdicts = {}  # the cache directory changed
        self._loaded_from = path
        try:
            stored = json.loads(path.read_text())
            self._verdicts |= {key: Verdict(**fields) for key, fields in stored.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("remembered kernel choices in %s cannot be read and are measured anew: %s", path, error)


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
