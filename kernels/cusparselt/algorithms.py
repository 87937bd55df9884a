"""Which of cuSPARSELt's algorithms runs a problem: searched once, checked against dense, remembered on disk."""

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from sparsedm_compile.cache import cache_directory

_log = logging.getLogger(__name__)

DEFAULT = 0
#: No algorithm gave the right result: the caller must go dense.
NONE = -1
# ‖out − dense‖ / ‖dense‖ of products with 16-bit operands, inner sums in fp32, lies between 1e-4 and 3e-3; of 8-bit
# ones, whose results are not rounded to 16 bits, below.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Problem:
    """One product ``(rows, width) 2:4 @ (width, tokens)``."""

    rows: int
    width: int
    tokens: int
    dtype: torch.dtype
    has_bias: bool

    @property
    def out_dtype(self) -> torch.dtype | None:
        """What the library must be asked for; None is the dtype of the operands. 8 bits hold no result."""
        return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}.get(self.dtype)

    @property
    def key(self) -> str:
        """The name under which the answer is remembered."""
        return f"{self.rows}x{self.width}x{self.tokens} {self.dtype} {'bias' if self.has_bias else 'no bias'}"


class Algorithms:
    """Algorithm numbers by problem, in memory and in one JSON file for each kind of GPU and version of the libraries.

    A search takes up to a second and runs on random operands, not on the caller's: a product against dense then shows
    whether the algorithm is right, which cuSPARSELt's own search does not check. While a CUDA graph is being captured
    nothing can be searched, and a problem that is not known yet runs the default.
    """

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._loaded_from: Path | None = None
        self._lock = threading.Lock()

    def path(self, device: torch.device) -> Path:
        """The file for this device; follows ``$SPARSEDM_CACHE_DIR``."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no gpu"
        versions = "|".join((gpu, torch.__version__, str(torch.backends.cusparselt.version())))
        return cache_directory() / f"cusparselt-{sha256(versions.encode()).hexdigest()[:16]}.json"

    def get(self, problem: Problem, device: torch.device) -> int:
        """The algorithm for ``problem``: one that was right, ``DEFAULT`` during a capture, or ``NONE``."""
        known = self._known.get(problem.key)
        if known is not None:
            return known
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return DEFAULT
        with self._lock:
            self._load(device)
            if problem.key not in self._known:
                self._known[problem.key] = _search(problem, device)
                self._save(device)
            return self._known[problem.key]

    def _load(self, device: torch.device) -> None:
        path = self.path(device)
        if self._loaded_from == path:
            return
        self._loaded_from = path
        try:
            stored = json.loads(path.read_text())
            self._known = {key: int(algorithm) for key, algorithm in stored.items()} | self._known
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("remembered algorithms in %s cannot be read and are searched anew: %s", path, error)

    def _save(self, device: torch.device) -> None:
        path = self.path(device)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
            with os.fdopen(handle, "w") as file:
                json.dump(self._known, file, indent=1)
            Path(temporary).replace(path)
        except OSError as error:
            _log.warning("cuSPARSELt algorithms are not remembered: %s", error)


def _search(problem: Problem, device: torch.device) -> int:
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device)
        return values * 32 if problem.out_dtype else values  # integers need some room

    with torch.inference_mode(False), torch.no_grad():
        # Of every four the first and the last: any pattern will do, and this one needs no mask.
        weight = random(problem.rows, problem.width)
        if problem.out_dtype is None:
            weight /= problem.width**0.5
        weight.view(problem.rows, -1, 4)[:, :, 1:3] = 0
        weight, x = weight.to(problem.dtype), random(problem.tokens, problem.width).to(problem.dtype)
        bias = random(problem.rows).to(problem.dtype) if problem.has_bias else None
        if problem.out_dtype is None:
            expected = torch.nn.functional.linear(x, weight, bias)
        else:
            expected = torch.nn.functional.linear(x.float(), weight.float())
        compressed = torch._cslt_compress(weight)
        arguments = {"bias": bias, "out_dtype": problem.out_dtype, "transpose_result": True}

        def right(algorithm: int) -> bool:
            out = torch._cslt_sparse_mm(compressed, x.t(), **arguments, alg_id=algorithm)
            error = (out.float() - expected.float()).norm() / expected.float().norm()
            return bool(error < _TOLERANCE)  # NaN is not

        def found() -> int:
            return int(torch._cslt_sparse_mm_search(compressed, x.t(), **arguments))

        return _first_right((found, lambda: DEFAULT), right, problem)


def _first_right(proposals: tuple[Callable[[], int], ...], right: Callable[[int], bool], problem: Problem) -> int:
    for propose in proposals:
        try:
            algorithm = propose()
            if right(algorithm):
                return algorithm
            _log.warning("cuSPARSELt algorithm %d gives wrong results for %s and is not used", algorithm, problem.key)
        except RuntimeError as error:
            _log.warning("cuSPARSELt cannot run %s: %s", problem.key, error)
    return NONE
