"""Where compiled kernels and remembered choices are kept."""

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """``$SPARSEDM_CACHE_DIR``, else ``sparsedm_compile`` in the user's cache directory."""
    chosen = os.environ.get("SPARSEDM_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sparsedm_compile"
