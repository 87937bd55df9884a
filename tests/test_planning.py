"""make_plan: what sparsify would do, from shapes alone."""

import json

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.models import create_uvit


def small_uvit(**overrides):
    return create_uvit("uvit-s/2", **{"embed_dim": 64, "depth": 2, "num_heads": 4, **overrides})


class Zoo(nn.Module):
    """One layer of each kind that a plan must have an answer for."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.odd = nn.Linear(50, 64)
        self.conv = nn.Conv2d(64, 64, 3)
        self.grouped = nn.Conv2d(64, 64, 3, groups=16)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.conv1d = nn.Conv1d(64, 64, 3)
        self.transposed = nn.ConvTranspose3d(64, 64, 3)
        self.attention = nn.MultiheadAttention(64, 4)
        self.normed = nn.utils.weight_norm(nn.Linear(64, 64))
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.mine = type("MyLinear", (nn.Linear,), {})(64, 64)
        self.norm = nn.LayerNorm(64)
        self.embedding = nn.Embedding(10, 64)


@pytest.fixture
def zoo():
    return Zoo()


def test_every_layer_is_listed_with_a_pattern_or_a_reason(zoo):
    plan = sdm.make_plan(zoo, "2:4", policy="all")
    assert {layer.name for layer in plan} == {
        "linear", "odd", "conv", "grouped", "depthwise", "conv1d", "transposed",
        "attention", "attention.out_proj", "normed", "parametrized", "mine",
    }  # fmt: skip
    assert len(plan) == 12
    for layer in plan:
        assert bool(layer.reason) == layer.pattern.is_dense


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd", "input width 50 is not a multiple of 4"),
        ("depthwise", "input width 1 is not a multiple of 4"),
        ("transposed", "ConvTranspose3d has no sparse kernel"),
        ("attention", "MultiheadAttention holds its projections in one parameter"),
        ("attention.out_proj", "subclass of Linear"),
        ("normed", "hook"),
        ("parametrized", "subclass of Linear"),
        ("mine", "MyLinear is a subclass of Linear"),
    ],
)
def test_reasons(zoo, name, words):
    layer = sdm.make_plan(zoo, "2:4", policy="all")[name]
    assert layer.pattern.is_dense
    assert words in layer.reason


def test_a_weight_that_is_used_without_a_mask_too_stays_dense():
    model = nn.ModuleDict({"tokens": nn.Embedding(64, 64), "out": nn.Linear(64, 64), "other": nn.Linear(64, 64)})
    model["out"].weight = model["tokens"].weight
    plan = sdm.make_plan(model, "2:4", policy="all")
    assert list(plan.patterns()) == ["other"]
    assert plan["out"].reason == "weight shared with 'tokens' (Embedding), which has no mask"
    with pytest.raises(ValueError, match=r"'out' cannot be 2:4 as its rule demands: weight shared with 'tokens'"):
        sdm.make_plan(model, "2:4", policy="all", rules={"out": "2:4"})


def test_sparse_layers(zoo):
    plan = sdm.make_plan(zoo, "2:4", policy="all")
    assert {name: str(pattern) for name, pattern in plan.patterns().items()} == {
        "linear": "2:4",
        "conv": "2:4",
        "grouped": "2:4",
        "conv1d": "2:4",
    }


def test_v_must_fit_the_group_of_a_convolution(zoo):
    plan = sdm.make_plan(zoo, "2:4v8", policy="all")
    assert "output width 4 is not a multiple of v = 8" in plan["grouped"].reason
    assert str(plan["conv"].pattern) == "2:4v8"


def test_changes_nothing(zoo):
    before = {name: type(module) for name, module in zoo.named_modules()}
    sdm.make_plan(zoo, "2:4", policy="all")
    assert before == {name: type(module) for name, module in zoo.named_modules()}


def test_needs_no_weights():
    with torch.device("meta"):
        model = small_uvit()
    assert len(sdm.make_plan(model, "2:4", policy="sparsedm").patterns()) == 4 * 3


def test_prints_as_a_table(zoo):
    text = str(sdm.make_plan(zoo, "2:4", policy="all"))
    for word in ("plan", "4 of 12 layers sparse", "linear", "conv2d", "64 x 64 x 3 x 3", "2:4", "not a multiple of 4"):
        assert word in text


def test_to_dict_is_json(zoo):
    plan = sdm.make_plan(zoo, "2:4", policy="all")
    stored = json.loads(json.dumps(plan.to_dict()))
    assert stored["conv"] == {"kind": "conv2d", "shape": [64, 64, 3, 3], "pattern": "2:4", "reason": ""}
    assert stored["odd"]["pattern"] == "dense"


def test_access_by_name(zoo):
    plan = sdm.make_plan(zoo, "2:4", policy="all")
    assert "conv" in plan
    assert "norm" not in plan
    with pytest.raises(KeyError):
        plan["norm"]
    assert plan == sdm.make_plan(zoo, "2:4", policy="all")
    assert plan != sdm.make_plan(zoo, "1:4", policy="all")


# --- rules ---------------------------------------------------------------------------------------------------------


def patterns(model, *args, **kwargs):
    return {name: str(pattern) for name, pattern in sdm.make_plan(model, *args, **kwargs).patterns().items()}


def test_rules_override_the_policy_and_the_last_one_wins():
    rules = {"*": "dense", "*.mlp.*": "1:4", "in_blocks.0.mlp.fc2": "2:4v4"}
    got = patterns(small_uvit(), "2:4", policy="sparsedm", rules=rules)
    assert got == {
        "in_blocks.0.mlp.fc1": "1:4",
        "in_blocks.0.mlp.fc2": "2:4v4",
        "mid_block.mlp.fc1": "1:4",
        "mid_block.mlp.fc2": "1:4",
        "out_blocks.0.mlp.fc1": "1:4",
        "out_blocks.0.mlp.fc2": "1:4",
    }


def test_a_rule_makes_sparse_what_the_policy_left_dense():
    plan = sdm.make_plan(small_uvit(), "2:4", policy="sparsedm", rules={"*.skip_linear": "2:4"})
    assert str(plan["out_blocks.0.skip_linear"].pattern) == "2:4"
    assert plan["out_blocks.0.skip_linear"].reason == ""


def test_a_glob_leaves_dense_what_cannot_take_its_pattern(zoo):
    plan = sdm.make_plan(zoo, "2:4", policy="all", rules={"*": "2:4"})
    assert "not a multiple of 4" in plan["odd"].reason
    assert str(plan["linear"].pattern) == "2:4"


@pytest.mark.parametrize("name", ["odd", "depthwise", "transposed", "attention", "mine"])
def test_an_exact_rule_that_cannot_hold_is_an_error(zoo, name):
    with pytest.raises(ValueError, match=f"layer '{name}' cannot be 2:4 as its rule demands"):
        sdm.make_plan(zoo, "2:4", policy="all", rules={name: "2:4"})


def test_an_exact_rule_may_ask_for_dense(zoo):
    plan = sdm.make_plan(zoo, "2:4", policy="all", rules={"odd": "dense", "linear": "dense"})
    assert plan["linear"].reason == "rule 'linear'"


def test_the_reason_names_the_rule():
    plan = sdm.make_plan(small_uvit(), "2:4", rules={"*.qkv": "dense"})
    assert plan["mid_block.attn.qkv"].reason == "rule '*.qkv'"


def test_layer_names_with_brackets_are_matched_exactly():
    model = nn.ModuleDict({"a[0]": nn.Linear(64, 64), "a0": nn.Linear(64, 64)})
    plan = sdm.make_plan(model, "2:4", policy="all", rules={"a[0]": "dense"})
    assert plan["a[0]"].pattern.is_dense


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"pattern": "2:5:4"}, ValueError, "unknown pattern '2:5:4'"),
        ({"pattern": "4:2"}, ValueError, "n must be smaller than m"),
        ({"pattern": 0.5}, TypeError, "float"),
        ({"policy": "best"}, ValueError, "unknown policy 'best': one of default, sparsedm"),
        ({"policy": 3}, TypeError, "policy must be a name or a callable"),
        ({"rules": {"no_such.*": "2:4"}}, ValueError, r"rule 'no_such\.\*' matches no layer; layers are: 'patch_embed"),
        ({"rules": {"*": "fast"}}, ValueError, "unknown pattern 'fast'"),
        ({"rules": ["*"]}, TypeError, "rules must map layer globs to patterns, got list"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        sdm.make_plan(small_uvit(), **kwargs)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        sdm.make_plan({}, "2:4")


def test_a_model_without_layers():
    with pytest.raises(ValueError, match="LayerNorm has no linear or convolution layer"):
        sdm.make_plan(nn.LayerNorm(4), "2:4")
