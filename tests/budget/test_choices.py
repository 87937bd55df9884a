"""Which patterns a plan may give to which layer."""

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.budget.choices import layer_choices

ALL = ("dense", "2:4", "1:4")


def spelled(choices):
    return {name: tuple(map(str, choice.options)) for choice in choices for name in choice.names}


def test_every_layer_is_decided_once(model, unchanged):
    choices = layer_choices(model, ["2:4", "1:4", "dense", "2:4"], policy="all")
    assert spelled(choices) == {
        "embed": ("dense",),  # two inputs make no group of four
        "blocks.0": ALL,
        "blocks.1": ALL,
        "conv": ALL,
        "tail": ALL,
    }


def test_policy_and_rules(model, unchanged):
    rules = {"blocks.*": "2:4v4", "blocks.1": "dense"}
    choices = layer_choices(model, ["1:4"], policy=lambda layer: layer.name != "conv", rules=rules)
    assert spelled(choices) == {
        "embed": ("dense",),
        "blocks.0": ("2:4v4",),
        "blocks.1": ("dense",),
        "conv": ("dense",),
        "tail": ("dense", "1:4"),
    }


def test_tied_layers_are_one_choice(make_model):
    model = make_model(tied=True)
    choices = layer_choices(model, ["2:4", "1:4"], policy="all")
    assert [choice.names for choice in choices] == [("embed",), ("blocks.0",), ("blocks.1", "tail"), ("conv",)]
    dense_for_one = layer_choices(model, ["2:4"], policy="all", rules={"tail": "dense"})
    assert spelled(dense_for_one)["blocks.1"] == ("dense",)
    with pytest.raises(ValueError, match=r"layers 'blocks.1', 'tail' share one weight, but .* no pattern in common"):
        layer_choices(model, ["2:4"], policy="all", rules={"tail": "2:4", "blocks.1": "1:4"})


def test_a_compiled_block_has_its_own_name(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert "blocks.0" in spelled(layer_choices(model, ["2:4"], policy="all"))


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        (["2:5x"], ValueError, "unknown pattern '2:5x'"),
        ([], ValueError, r"candidates hold no sparse pattern \(\[\]\)"),
        (["dense"], ValueError, "candidates hold no sparse pattern"),
        ("2:4", TypeError, "candidates must be a list of patterns such as .*, got '2:4'"),
        ([24], TypeError, "pattern must be a string"),
        (["5:7"], ValueError, "no layer of Denoiser takes any of 5:7: .*input width 32 is not a multiple of 7"),
    ],
)
def test_bad_candidates(model, unchanged, candidates, error, message):
    with pytest.raises(error, match=message):
        layer_choices(model, candidates, policy="all")


def test_bad_models(model, unchanged):
    with pytest.raises(ValueError, match="ReLU has no linear or convolution layer"):
        layer_choices(nn.ReLU(), ["2:4"])
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        layer_choices(3, ["2:4"])
    with pytest.raises(ValueError, match="unknown policy 'any'"):
        layer_choices(model, ["2:4"], policy="any")
    with pytest.raises(ValueError, match="rule 'nothing' matches no layer"):
        layer_choices(model, ["2:4"], rules={"nothing": "2:4"})


def test_sparse_and_packed_models_are_refused(make_model, inputs):
    model = make_model()
    sdm.sparsify(model, "2:4", policy="all")
    with pytest.raises(ValueError, match="model is sparse already: a plan is made for the dense model"):
        layer_choices(model, ["2:4"])
    sdm.pack(model)
    with pytest.raises(ValueError, match="model is packed already"):
        layer_choices(model, ["2:4"])


def test_weights_that_cannot_be_masked_are_refused(model):
    with torch.no_grad():
        model.tail.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'tail' has weights that are not finite"):
        layer_choices(model, ["2:4"], policy="all")
    with torch.device("meta"):
        absent = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="layer '0' is on meta"):
        layer_choices(absent, ["2:4"], policy="all")
