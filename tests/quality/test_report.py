import dataclasses

import pytest
import torch

from sparsedm_compile.quality.judge import Score
from sparsedm_compile.quality.report import QualityReport, render_html


def score(name, frechet, seeds):
    return Score(
        name=name,
        pattern="2:4",
        macs=28_100_000,
        attention_macs=0,
        weight_bytes=2_790_000,
        validation_loss=0.05,
        frechet=frechet,
        kernel=frechet,
        samples=100,
        solver="dpm-solver++",
        steps=8,
        seeds=seeds,
        weights_sha256="a",
        features_sha256="b",
        seconds=1.0,
    )


def report(*rows):
    return QualityReport("title", "FD-CNN", "b" * 64, 0.9, 0.1, rows, {"sparse": (1.5, 0.1)}, {"scores": {}})


def test_cells():
    dense, sparse, early = report(
        score("dense", (10.0, 14.0), (0, 1)), score("sparse", (12.0, 15.0), (0, 1)), score("early", (11.0,), (0,))
    ).cells()
    assert dense[5:7] == ("12.000 ± 2.828", "")  # sample standard deviation
    assert sparse[5:7] == ("13.500 ± 2.121", "+12.5%")
    assert early[5:7] == ("11.000", "+10.0%")  # against the dense model's figure of the same seed
    assert (dense[8], sparse[8]) == ("", "1.50x")


def test_scores_merge_and_come_back_from_json():
    whole = score("x", (1.0,), (0,)).merged(score("x", (2.0, 3.0), (1, 2)))
    assert (whole.frechet, whole.seeds, whole.seconds) == ((1.0, 2.0, 3.0), (0, 1, 2), 2.0)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in whole.to_dict().items()}
    assert Score.from_dict(values) == whole
    assert whole.frechet_mean == pytest.approx(2.0)
    assert dataclasses.replace(whole, frechet=(1.0,)).frechet_spread == 0.0


def test_html_escapes_names():
    rows = report(score("dense", (10.0,), (0,)), score("<b>", (10.0,), (0,)))
    html = render_html(rows, {row.name: torch.zeros(3, 1, 4, 4) for row in rows.rows})
    assert "<td>&lt;b&gt;</td>" in html
    assert "<td><b></td>" not in html
