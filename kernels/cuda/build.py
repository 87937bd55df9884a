"""Compile CUDA C++ at run time, without a toolkit: NVRTC, as CuPy ships it, and a cache of machine code on disk."""

import logging
import os
import tempfile
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from sparsedm_compile.cache import cache_directory

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent

#: macro -> value; a tuple, so that it can be a key
Defines = tuple[tuple[str, int], ...]


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None. Imports nothing."""
    if find_spec("cupy") is None:
        return "CuPy is not installed: pip install sparsedm-compile[cuda13]"
    return None


def compile_cubin(source: str, arch: str, defines: Defines) -> bytes:
    """Machine code of ``source``, a file of this folder, for ``arch`` (``"sm_80"``, ``"sm_90a"``). Needs no GPU.

    Raises:
        RuntimeError: NVRTC refuses the source or the architecture; the message holds its log.
    """
    from cupy_backends.cuda.libs import nvrtc

    headers = sorted(_SOURCES.glob("*.cuh"))
    program = nvrtc.createProgram(
        (_SOURCES / source).read_text(),
        source,
        tuple(path.read_bytes() for path in headers),
        tuple(path.name.encode() for path in headers),
    )
    try:
        nvrtc.compileProgram(program, _options(arch, defines))
        # CuPy drops the last byte, as if it were the end of a string: the file would be one byte short.
        return nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"NVRTC cannot compile {source} for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@lru_cache(maxsize=256)
def cubin_path(source: str, arch: str, defines: Defines) -> Path:
    """A file with the machine code, compiled if no earlier process did; follows ``$SPARSEDM_CACHE_DIR``."""
    from cupy_backends.cuda.libs import nvrtc

    texts = [path.read_bytes() for path in sorted(_SOURCES.glob("*.cu*"))]
    key = sha256(repr((source, _options(arch, defines), nvrtc.getVersion(), texts)).encode()).hexdigest()[:24]
    path = cache_directory() / "cuda" / f"{key}.cubin"
    if path.exists():
        return path
    cubin = compile_cubin(source, arch, defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".cubin")
    except OSError as error:
        _log.warning("compiled CUDA kernels are not kept: %s", error)
        handle, temporary = tempfile.mkstemp(suffix=".cubin")
        path = Path(temporary)
    with os.fdopen(handle, "wb") as file:
        file.write(cubin)
    Path(temporary).replace(path)
    return path


def _options(arch: str, defines: Defines) -> tuple[str, ...]:
    return (f"-arch={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in defines))
