import csv
import sys

import pytest
import torch
from torch import nn

from sparsedm_compile.ema import EMA
from sparsedm_compile.training import train
from sparsedm_compile.training_log import CsvLog, TensorBoardLog


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def run(log, steps, **options):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train(
        model,
        optimizer,
        lambda x: model(x).square().mean(),
        [torch.ones(3, 2)],
        ema=EMA(model, 0.9),
        steps=steps,
        warmup_steps=4,
        progress=False,
        log=log,
        **options,
    )


def test_one_line_a_step_with_the_warm_up(tmp_path):
    record = run(CsvLog(tmp_path / "log.csv"), 5)
    header, *lines = read(tmp_path / "log.csv")
    assert header == ["step", "loss", "learning_rate"]
    assert [int(line[0]) for line in lines] == [1, 2, 3, 4, 5]
    assert [float(line[1]) for line in lines] == record.losses
    assert [float(line[2]) for line in lines] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    whole = run(CsvLog(tmp_path / "whole.csv"), 6)
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2}
    run(CsvLog(tmp_path / "log.csv"), 4, **options)
    # As if killed after two steps that no checkpoint holds.
    log = CsvLog(tmp_path / "log.csv")
    log.write(5, {"loss": 9.0, "learning_rate": 9.0})
    log.write(6, {"loss": 9.0, "learning_rate": 9.0})
    run(CsvLog(tmp_path / "log.csv"), 6, **options)
    assert read(tmp_path / "log.csv") == read(tmp_path / "whole.csv")
    assert len(whole.losses) == 6


def test_a_rewrite_that_fails_keeps_every_line(tmp_path, monkeypatch):
    log = CsvLog(tmp_path / "log.csv")
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    before = (tmp_path / "log.csv").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="is as it was before"):
        CsvLog(tmp_path / "log.csv").write(3, {"loss": 2.0})
    assert (tmp_path / "log.csv").read_bytes() == before


def test_a_new_run_starts_the_file_anew(tmp_path):
    (tmp_path / "log.csv").write_text("something else\n1,2\n")
    run(CsvLog(tmp_path / "log.csv"), 1)
    assert len(read(tmp_path / "log.csv")) == 2


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = run(TensorBoardLog(tmp_path), 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(record.losses, start=1)
    ]


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install .sparsedm-compile\[tensorboard\]"):
        TensorBoardLog(tmp_path)
