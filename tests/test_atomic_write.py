"""The old content or the new, and an error that says which."""

import errno
import os
import stat

import pytest

from sparsedm_compile.atomic_write import write_atomically


def fail_for_directories(monkeypatch, number: int) -> None:
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", failing)


def write(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text))


def test_a_directory_that_cannot_be_synced_is_no_claim_about_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, "old")
    fail_for_directories(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=r"file is written, but after a crash its old content may be.*Input/output"):
        write(path, "new")
    assert path.read_text() == "new"


def test_file_systems_without_directory_sync_are_fine(tmp_path, monkeypatch):
    fail_for_directories(monkeypatch, errno.EINVAL)
    write(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "file"
    write(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"could not be written and is as it was before: .*No space left"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
