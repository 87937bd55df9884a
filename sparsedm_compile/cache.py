"""Where compiled kernels and remembered choices are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$SPARSEDM_CACHE_DIR``, else ``$XDG_CACHE_HOME/sparsedm_compile``, else ``~/.cache/sparsedm_compile``."""
    chosen = os.environ.get("SPARSEDM_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparsedm_compile"
