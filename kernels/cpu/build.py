"""Compiling the C++ of this folder at first use, and loading it."""

import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

from sparsedm_compile.cache import cache_directory
from sparsedm_compile.kernels.cpu import tracing

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "ops.cpp"
_TORCH = Path(torch.__file__).parent
_lock = threading.Lock()


class BuildError(RuntimeError):
    """The C++ could not be compiled or loaded; the message says why, with the compiler's last lines."""


def _compiler() -> str:
    named = os.environ.get("CXX")
    names = [named] if named else ["g++", "clang++", "c++"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler: looked for {', '.join(names)}; install one or set CXX")


def _flags() -> list[str]:
    """Flags without paths.

    For tests, ``$SPARSEDM_CPU_MARCH`` names an older processor than this one, and ``$SPARSEDM_CPU_FLAGS`` adds flags
    (``tests/sanitize.sh``).
    """
    march = os.environ.get("SPARSEDM_CPU_MARCH", "native")
    # -O2: the speed of -O3, measured, in half the compile time. No -ffast-math: masks depend on the order of sums.
    return [f"-march={march}", "-std=c++20", "-O2", "-fopenmp", "-fPIC", "-w", *_extra_flags()]


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("SPARSEDM_CPU_FLAGS", ""))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started: {error}") from error
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise BuildError(f"{command[0]} failed with status {done.returncode}:\n{tail}")
    return done.stdout


def _fingerprint(compiler: str) -> str:
    """Names a build by all that decides it.

    The compiler's own macros for these flags tell its version and every feature of the processor that it would use, so
    unlike machines that share a home directory do not load each other's code.
    """
    digest = hashlib.sha256()
    digest.update(_run([compiler, *_flags(), "-x", "c++", "-dM", "-E", os.devnull]).encode())
    digest.update(repr((_flags(), torch.__version__, source_digest())).encode())
    return digest.hexdigest()[:20]


@functools.cache
def source_digest() -> str:
    """Names the C++ sources: what is compiled from other ones may run, and pack, differently."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCE.parent.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library() -> Path:
    """Return the compiled library, compiling it if the cache has none for this source, compiler, torch and processor.

    Builders in other processes are harmless: each writes a file of its own and renames it into place.

    Raises:
        BuildError: no compiler, a failed compilation, or a cache directory that cannot be written.
    """
    compiler = _compiler()
    try:
        folder = cache_directory()
        library = folder / f"cpu-{_fingerprint(compiler)}.so"
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(suffix=".so", prefix=f"{library.stem}-", dir=folder)
        os.close(handle)
        try:
            include = _TORCH / "include"
            paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{_TORCH / 'lib'}"]
            _run([compiler, *_flags(), "-shared", str(_SOURCE), *paths, "-ltorch_cpu", "-lc10", "-o", partial])
            Path(partial).replace(library)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(
            f"the cache directory {cache_directory()} cannot be used: {error}; set SPARSEDM_CACHE_DIR"
        ) from error
    return library


@functools.cache
def _load_once() -> str | None:
    try:
        library = compile_library()
        try:
            torch.ops.load_library(library)
            tracing.register()
        except (OSError, RuntimeError) as error:
            raise BuildError(f"{library} cannot be loaded: {error}") from error
    except BuildError as error:
        logger.warning("CPU kernels are off, layers run on other kernels: %s", error)
        return str(error)
    return None


def load() -> str | None:
    """Make ``torch.ops.sparsedm_cpu`` available: None, or why not. The first call compiles; a failure warns once."""
    with _lock:
        return _load_once()
