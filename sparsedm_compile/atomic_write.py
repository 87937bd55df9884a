"""Writing a file so that whoever looks, after a crash too, finds the old content or the new and nothing between."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

# What file systems that cannot sync a directory (network and FUSE ones) answer.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, bring it to the disk, and move it to ``path``.

    Raises:
        OSError: what went wrong (a full disk, no permission). ``path`` is as it was and the temporary file is gone,
            unless the message says that the new content is in place and may not outlast a crash.
    """
    temporary = path.with_name(f".{path.name}.partial")  # one name, so that a killed writer leaves at most one behind
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written and is as it was before: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        _sync_directory(path.parent)
    except OSError as error:
        raise OSError(f"{path} is written, but after a crash its old content may be back: {error}") from error


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
