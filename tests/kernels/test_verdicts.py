"""The store of verdicts: shared by processes, and never the cause of an error."""

import json
import logging
import multiprocessing

import pytest

from sparsedm_compile.kernels.verdicts import Verdict, VerdictStore

CPU = Verdict("cpu", "1.50x the fastest dense (onednn)", 1e-3, 1.5e-3, 1.5)
DENSE = Verdict("dense", "0.90x", 1e-3, 0.9e-3, 0.9)


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_remembers(directory):
    store = VerdictStore()
    assert store.get("a") is None
    store.put("a", CPU)
    assert store.get("a") == CPU
    assert VerdictStore().get("a") == CPU
    assert store.path.parent == directory


def test_reads_what_was_remembered_before_the_time_of_torchs_own_operator_was(directory):
    store = VerdictStore()
    store.put("a", CPU)
    stored = json.loads(store.path.read_text())
    assert stored["a"].pop("native_seconds", "absent") is None
    store.path.write_text(json.dumps(stored))
    assert VerdictStore().get("a") == CPU


def test_leaves_nothing_but_its_file(directory):
    store = VerdictStore()
    store.put("a", CPU)
    store.put("b", DENSE)
    assert [path for path in directory.iterdir() if "lock" not in path.name] == [store.path]


def test_interleaved_writers_keep_each_others_entries():
    one, two = VerdictStore(), VerdictStore()
    one.get("a"), two.get("a")  # both have read the empty file
    one.put("a", CPU)
    two.put("b", DENSE)
    one.put("c", CPU)
    fresh = VerdictStore()
    assert [fresh.get(key) for key in "abc"] == [CPU, DENSE, CPU]


def _write(worker: int) -> None:
    store = VerdictStore()
    for i in range(10):
        store.put(f"{worker}-{i}", CPU)


def test_concurrent_processes_keep_each_others_entries():
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    fresh = VerdictStore()
    assert all(fresh.get(f"{worker}-{i}") == CPU for worker in range(4) for i in range(10))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b'{"a": 1}',
        b'{"a": {"kernel": "cpu"}}',
        b'{"a": {"unknown": 1}}',
        b"\xff\xfe\x00",
        b"null",
    ],
)
def test_a_damaged_file_is_measured_anew_with_a_warning(directory, content, caplog):
    directory.mkdir()
    VerdictStore().path.write_bytes(content)
    store = VerdictStore()
    with caplog.at_level(logging.WARNING):
        assert store.get("a") is None
    assert "measured anew" in caplog.text
    assert str(store.path) in caplog.text
    store.put("a", CPU)
    assert VerdictStore().get("a") == CPU  # and the file is whole again


def test_a_directory_that_cannot_be_made(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    store = VerdictStore()
    with caplog.at_level(logging.WARNING):
        store.put("a", CPU)
    assert store.get("a") == CPU  # in memory
    assert "not remembered" in caplog.text


def test_an_unwritable_directory(monkeypatch, tmp_path, caplog):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # Not by chmod: root may write everywhere.
    monkeypatch.setattr("sparsedm_compile.kernels.verdicts.tempfile.mkstemp", refuse)
    store = VerdictStore()
    with caplog.at_level(logging.WARNING):
        store.put("a", CPU)
        store.put("b", CPU)
    assert (store.get("a"), store.get("b")) == (CPU, CPU)
    assert caplog.text.count("not remembered") == 1  # said once, not once a layer


def test_follows_the_cache_directory(monkeypatch, tmp_path):
    store = VerdictStore()
    store.put("a", CPU)
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path / "other"))
    assert store.get("a") is None


def test_unsettled_verdicts_stay_in_the_process():
    store = VerdictStore()
    busy = Verdict("cpu", "on a busy machine", 1.0, 2.0, 2.0, settled=False)
    store.put("a", busy)
    store.put("b", CPU)
    assert store.get("a") == busy
    assert VerdictStore().get("a") is None
    assert VerdictStore().get("b") == CPU


def test_the_file_is_readable_json():
    store = VerdictStore()
    store.put("a", CPU)
    assert json.loads(store.path.read_text())["a"]["kernel"] == "cpu"
