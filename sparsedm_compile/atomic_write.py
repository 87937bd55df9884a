"""Writing a file so that whoever looks, after a crash too, finds the old content or the new and nothing between."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, bring it to the disk, and move it to ``path``.

    Raises:
        OSError: what went wrong (a full disk, no permission). ``path`` is as it was, the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.partial")  # one name, so that a killed writer leaves at most one behind
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written and is as it was before: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
