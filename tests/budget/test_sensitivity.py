"""Measured damage against copies of the model whose weights are masked for good."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.budget import Sensitivity, measure_sensitivity
from sparsedm_compile.budget.choices import layer_choices
from sparsedm_compile.budget.sensitivity import output_errors
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.pattern import Pattern

CANDIDATES = ["2:4", "1:4"]


def expected_damage(model, calibration, masked_dense, rules):
    """The mean over every element of every batch, of a model that was really made sparse."""
    sparse = copy.deepcopy(model).eval()
    sdm.sparsify(sparse, "dense", policy="all", rules=rules)
    reference, dense = masked_dense(sparse), copy.deepcopy(model).eval()
    differences = [
        (reference(*batch.inputs).double() - dense(*batch.inputs).double()).flatten() for batch in calibration
    ]
    return torch.cat(differences).square().mean().item()


def test_each_layer_alone(model, calibration, masked_dense, unchanged):
    sensitivity = measure_sensitivity(model, calibration, candidates=CANDIDATES, policy="all")
    assert list(sensitivity.damage) == ["blocks.0", "blocks.1", "conv", "tail"]
    for name, row in sensitivity.damage.items():
        assert list(row) == CANDIDATES
        for pattern, damage in row.items():
            expected = expected_damage(model, calibration, masked_dense, {name: pattern})
            assert damage == pytest.approx(expected, rel=1e-4)
        assert 0 < row["2:4"] < row["1:4"]


def test_a_whole_plan(model, calibration, masked_dense, unchanged):
    rules = {"blocks.0": "2:4", "conv": "1:4"}
    (error,) = output_errors(model, calibration, [{name: Pattern.parse(p) for name, p in rules.items()}])
    assert error == pytest.approx(expected_damage(model, calibration, masked_dense, rules), rel=1e-4)
    assert output_errors(model, calibration, [{}]) == [0.0]


def test_tied_layers_are_masked_together(make_model, calibration, masked_dense):
    model = make_model(tied=True)
    sensitivity = measure_sensitivity(model, calibration, candidates=["2:4"], policy="all")
    assert "tail" not in sensitivity.damage
    expected = expected_damage(model, calibration, masked_dense, {"blocks.1": "2:4", "tail": "2:4"})
    assert sensitivity.damage["blocks.1"]["2:4"] == pytest.approx(expected, rel=1e-4)


def test_a_weight_that_an_embedding_shares_is_not_tried(calibration):
    # As in sparsify: no mask would reach the embedding, so the layer stays dense.
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(32, 32)
            self.middle = nn.Linear(32, 32, bias=False)
            self.out = nn.Linear(32, 32, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x, timesteps):
            return self.out(self.middle(x)) + self.embedding(timesteps.long() % 32)

    torch.manual_seed(0)
    model = Tied()
    sensitivity = measure_sensitivity(model, calibration, candidates=["2:4"], policy="all")
    weight = model.middle.weight.detach()
    lost = model.out.weight.detach() @ weight.masked_fill(sdm.magnitude_mask(weight, "2:4"), 0)
    expected = torch.cat([(batch.inputs[0] @ lost.T).flatten() for batch in calibration]).square().mean().item()
    assert list(sensitivity.damage) == ["middle"]
    assert sensitivity.damage["middle"]["2:4"] == pytest.approx(expected, rel=1e-4)


def test_compiled_models_and_outputs_of_diffusers(model, calibration):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, *args):
            return SimpleNamespace(sample=self.net(*args))

    expected = measure_sensitivity(model, calibration, candidates=["2:4"], policy="all").damage
    wrapped = measure_sensitivity(Wrapped(), calibration, candidates=["2:4"], policy="all").damage
    assert wrapped == {f"net.{name}": row for name, row in expected.items()}
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    assert measure_sensitivity(compiled, calibration, candidates=["2:4"], policy="all").damage == expected


def test_json_and_table(model, calibration):
    sensitivity = measure_sensitivity(model, calibration, candidates=CANDIDATES, policy="all")
    assert Sensitivity(**json.loads(json.dumps(sensitivity.to_dict()))) == sensitivity
    assert f"{sensitivity.damage['conv']['1:4']:.3g}" in str(sensitivity)


def test_a_table_of_other_candidates_is_refused(model, calibration):
    sensitivity = measure_sensitivity(model, calibration, candidates=["2:4"], policy="all")
    choice = layer_choices(model, CANDIDATES, policy="all")[1]
    with pytest.raises(ValueError, match=r"holds no damage of layer .blocks\.0. at 1:4: measure it with"):
        sensitivity.of(choice)


def test_errors(model, calibration, unchanged):
    def measure(batches, network=model):
        return measure_sensitivity(network, batches, candidates=["2:4"], policy="all")

    with pytest.raises(ValueError, match="calibration is empty"):
        measure([])
    with pytest.raises(TypeError, match="calibration must be a list of CalibrationBatch"):
        measure([torch.zeros(2, 32)])
    with pytest.raises(TypeError, match="calibration must be a list of CalibrationBatch"):
        measure(iter(calibration))
    noisy, times = calibration[0].inputs
    broken = CalibrationBatch((noisy * torch.inf, times), calibration[0].noise)
    with pytest.raises(ValueError, match="predicts noise that is not finite on the calibration batches"):
        measure([broken])

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, *args):
            return self.net(*args), None

    with pytest.raises(TypeError, match="Pair answers tuple: wrap it"):
        measure(calibration, Pair())
