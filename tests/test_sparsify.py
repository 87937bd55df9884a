"""sparsify, set_pattern and use_pattern: in place, keys unchanged, wholly or not at all."""

import copy
import pickle

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.models import create_uvit, example_inputs
from sparsedm_compile.pattern import Pattern


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.Linear(64, 30)).eval()


def snapshot(model: nn.Module) -> list:
    """All that sparsify could change."""
    modules = [(n, type(m), m.__dict__.get("pattern"), m.training) for n, m in model.named_modules()]
    tensors = [(k, t.data_ptr(), t.dtype, t.clone()) for k, t in model.state_dict().items() if t.device.type != "meta"]
    attributes = sorted(model.__dict__)
    return [modules, attributes, [t[:3] for t in tensors], [t[3].nan_to_num().tolist() for t in tensors]]


def masked(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    return weight * magnitude_mask_naive(weight, Pattern.parse(pattern))


def small_unet():
    return diffusers.UNet2DModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


MODELS = {
    "uvit": lambda: create_uvit("uvit-s/2", embed_dim=64, depth=2, num_heads=4),
    "UNet2DModel": small_unet,
    "DiT": lambda: diffusers.DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=16, num_layers=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_keys_weights_and_dense_checkpoints_survive(name):
    model = MODELS[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    plan = sdm.sparsify(model, "2:4")
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # optimizers stay bound
    model.load_state_dict(before, strict=True)
    assert plan.patterns()
    modules = dict(model.named_modules())
    for layer in plan:
        assert str(layer.pattern) == getattr(modules[layer.name], "pattern", "dense")
    assert str(plan) == str(sdm.get_plan(model))


def test_layers_compute_with_the_masked_weight():
    model = net()
    x = torch.randn(5, 48)
    want = F.gelu(F.linear(x, masked(model[0].weight, "2:4"), model[0].bias))
    want = F.linear(F.linear(want, masked(model[2].weight, "2:4")), masked(model[3].weight, "2:4"), model[3].bias)
    sdm.sparsify(model, "2:4", policy="all")
    torch.testing.assert_close(model(x), want)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
        torch.testing.assert_close(model(x), want)  # the kept mask


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
def test_convolutions_compute_with_the_masked_weight(padding_mode):
    conv = nn.Conv2d(32, 32, 3, stride=2, padding=1, dilation=1, groups=2, padding_mode=padding_mode)
    reference = copy.deepcopy(conv)
    reference.weight.data = masked(reference.weight.data, "1:4v2")
    sdm.sparsify(conv, "1:4v2", policy="all")
    x = torch.randn(2, 32, 9, 9)
    assert torch.equal(conv(x), reference(x))


def test_masks_follow_the_weights_in_eager():
    model, x = net(), torch.randn(5, 48)
    sdm.sparsify(model, "2:4", policy="all")
    with torch.no_grad():
        model(x)
        for weight in (model[0].weight, model[2].weight):
            weight.copy_(torch.randn_like(weight))
        want = F.linear(
            F.gelu(F.linear(x, masked(model[0].weight, "2:4"), model[0].bias)), masked(model[2].weight, "2:4")
        )
        torch.testing.assert_close(model[:3](x), want)


def test_training_reaches_every_weight():
    model = net()
    sdm.sparsify(model, "1:4", policy="all")
    model(torch.randn(8, 48)).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad.abs().min() > 0 or parameter.dim() == 1


def test_a_single_layer_is_a_model():
    layer = nn.Linear(64, 64)
    plan = sdm.sparsify(layer, "2:4")
    assert layer.pattern == "2:4"
    assert plan[""].name == ""
    assert "(model)" in str(plan)


def test_repr_shows_the_pattern():
    model = net()
    sdm.sparsify(model, "2:4v2", policy="all")
    assert "SparseLinear(in_features=48, out_features=64, bias=True, pattern='2:4v2')" in repr(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_sparse_and_independent(copied):
    model, x = net(), torch.randn(5, 48)
    sdm.sparsify(model, "2:4", policy="all")
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    assert sdm.get_plan(twin) == sdm.get_plan(model)
    sdm.set_pattern(twin, "1:4")
    assert model[0].pattern == "2:4"


def test_isinstance_and_the_base_class_survive():
    model = net()
    sdm.sparsify(model, "2:4", policy="all")
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[0], sdm.SparseLinear)


def test_bf16_and_later_casts():
    model, x = net().bfloat16(), torch.randn(5, 48)
    sdm.sparsify(model, "2:4", policy="all")
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert model.float()(x).dtype == torch.float32


def test_works_on_a_compiled_wrapper():
    model = net()
    sdm.sparsify(torch.compile(model, backend="eager"), "2:4", policy="all")
    assert model[0].pattern == "2:4"


def test_layer_shared_by_two_names():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, shared, nn.Linear(64, 64))
    plan = sdm.sparsify(model, "2:4", policy="all")
    assert [layer.name for layer in plan] == ["0", "2"]


# --- bad input: a clear error, and the model as it was -------------------------------------------------------------


def with_nan(value=float("nan")):
    model = net()
    model[3].weight.data[7, 11] = value
    return model


def tied():
    model = net()
    model.append(nn.Linear(64, 64))
    model[4].weight = model[2].weight
    return model


def on_meta():
    with torch.device("meta"):
        return net()


BAD = {
    "unknown pattern": (net, {"pattern": "2-4"}, ValueError, "unknown pattern '2-4'"),
    "n > m": (net, {"pattern": "4:2"}, ValueError, "n must be smaller than m"),
    "n = m": (net, {"pattern": "4:4"}, ValueError, "n must be smaller than m"),
    "forced width": (
        lambda: nn.Sequential(net(), nn.Linear(30, 64)),
        {"rules": {"1": "2:4"}},
        ValueError,
        r"layer '1' cannot be 2:4 as its rule demands: input width 30 is not a multiple of 4",
    ),
    "no layer takes it": (lambda: nn.Linear(30, 64), {}, ValueError, "no layer of Linear takes 2:4: input width 30"),
    "nan": (with_nan, {}, ValueError, "layer '3' has weights that are not finite"),
    "inf": (lambda: with_nan(float("inf")), {}, ValueError, "layer '3' has weights that are not finite"),
    "float64": (lambda: net().double(), {}, TypeError, r"layer '0' has torch\.float64 weights"),
    "float64 in the last layer": (
        lambda: nn.Sequential(net(), nn.Linear(64, 64).double()), {}, TypeError, r"layer '1' has torch\.float64 weights"
    ),
    "complex": (lambda: net().to(torch.complex64), {}, TypeError, r"torch\.complex64"),
    "meta": (on_meta, {}, ValueError, "on meta"),
    "tied": (tied, {"rules": {"4": "1:4"}}, ValueError, r"'2' \(2:4\) and '4' \(1:4\) share one weight"),
    "tied, one dense": (tied, {"rules": {"4": "dense"}}, ValueError, r"'2' \(2:4\) and '4' \(dense\) share one weight"),
    "unknown policy": (net, {"policy": "paper"}, ValueError, "unknown policy 'paper'"),
    "wrong policy": (net, {"policy": "sparsedm"}, ValueError, "found none of its layers"),
    "raising policy": (net, {"policy": lambda layer: 1 / 0}, ZeroDivisionError, "division"),
    "unknown rule": (net, {"rules": {"7": "dense"}}, ValueError, "rule '7' matches no layer"),
    "rule of no pattern": (net, {"rules": {"0": "2of4"}}, ValueError, "unknown pattern '2of4'"),
    "dense, but float64": (lambda: net().double(), {"pattern": "dense"}, TypeError, "float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_error_leaves_the_model_as_it_was(case):
    factory, kwargs, error, message = BAD[case]
    model = factory()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sdm.sparsify(model, **{"pattern": "2:4", "policy": "all", **kwargs})
    assert snapshot(model) == before


def test_twice_is_an_error():
    model = net()
    sdm.sparsify(model, "2:4", policy="all")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"sparse already: use set_pattern"):
        sdm.sparsify(model, "1:4", policy="all")
    assert snapshot(model) == before


def test_a_part_that_is_sparse_already():
    model = nn.Sequential(net(), net())
    sdm.sparsify(model[0], "2:4", policy="all")
    with pytest.raises(ValueError, match="sparse already"):
        sdm.sparsify(model, "2:4", policy="all")
    with pytest.raises(ValueError, match=r"parts of the model were made sparse on their own \(0\)"):
        sdm.set_pattern(model, "1:4")


def test_not_a_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        sdm.sparsify([net()], "2:4")


def test_frozen_tied_weights_of_one_pattern_are_fine():
    model = tied()
    plan = sdm.sparsify(model, "2:4", policy="all")
    assert len(plan.patterns()) == 4
    assert model[4].weight is model[2].weight


def test_weights_that_stay_dense_may_be_anything():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double())
    model[1].weight.data[0, 0] = float("nan")
    plan = sdm.sparsify(model, "2:4", policy="all", rules={"1": "dense"})
    assert list(plan.patterns()) == ["0"]
    assert type(model[1]) is nn.Linear


# --- set_pattern and use_pattern -----------------------------------------------------------------------------------


@pytest.fixture
def sparse():
    model = net()
    sdm.sparsify(model, "2:4", policy="all")
    return model


def patterns(model):
    return [getattr(m, "pattern", None) for m in model if isinstance(m, nn.Linear)]


def test_set_pattern_switches_from_the_same_weights(sparse):
    x = torch.randn(3, 48)
    dense = net()(x)
    before = sparse(x)
    plan = sdm.set_pattern(sparse, "1:4")
    assert set(map(str, plan.patterns().values())) == {"1:4"}
    assert not torch.allclose(sparse(x), before)
    sdm.set_pattern(sparse, "dense")
    assert torch.equal(sparse(x), dense)
    sdm.set_pattern(sparse, "2:4")
    assert torch.equal(sparse(x), before)


def test_set_pattern_takes_rules(sparse):
    plan = sdm.set_pattern(sparse, "1:4", rules={"0": "dense", "2": "4:8"})
    assert patterns(sparse) == ["dense", "4:8", "1:4"]
    assert plan["0"].reason == "rule '0'"
    assert sdm.get_plan(sparse) == plan


def test_a_pattern_that_does_not_fit_leaves_the_layer_dense_and_later_returns():
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 64))
    sdm.sparsify(model, "2:4", policy="all")
    plan = sdm.set_pattern(model, "31:32")  # 48 is no multiple of 32
    assert patterns(model) == ["dense", "31:32"]
    assert "48 is not a multiple of 32" in plan["0"].reason
    sdm.set_pattern(model, "2:4")
    assert patterns(model) == ["2:4", "2:4"]


def test_a_layer_that_the_first_pattern_did_not_fit_can_take_a_later_one():
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 64))
    sdm.sparsify(model, "31:32", policy="all")
    sdm.set_pattern(model, "2:4")
    assert patterns(model) == ["2:4", "2:4"]


def test_starting_dense():
    model = net()
    x = torch.randn(3, 48)
    want = model(x)
    plan = sdm.sparsify(model, "dense", policy="all")
    assert not plan.patterns()
    assert torch.equal(model(x), want)
    sdm.set_pattern(model, "2:4")
    assert patterns(model) == ["2:4"] * 3


def test_layers_left_dense_by_sparsify_stay_so():
    model = net()
    sdm.sparsify(model, "2:4", policy="all", rules={"0": "dense"})
    plan = sdm.set_pattern(model, "1:4")
    assert patterns(model) == [None, "1:4", "1:4"]
    assert plan["0"].reason == "rule '0'"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '0' was left dense by sparsify \(rule '0'\)"):
        sdm.set_pattern(model, "1:4", rules={"0": "1:4"})
    assert snapshot(model) == before


def test_layers_added_later_stay_dense(sparse):
    sparse.append(nn.Linear(64, 64))
    plan = sdm.set_pattern(sparse, "1:4")
    assert plan["4"].reason == "added after sparsify"
    assert type(sparse[4]) is nn.Linear


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"pattern": "9"}, ValueError, "unknown pattern '9'"),
        ({"pattern": "1:4", "rules": {"nothing": "dense"}}, ValueError, "matches no layer"),
        ({"pattern": "1:4", "rules": {"0": "31:32"}}, ValueError, "layer '0' cannot be 31:32"),
    ],
)
@pytest.mark.parametrize("how", [sdm.set_pattern, lambda *a, **k: sdm.use_pattern(*a, **k).__enter__()])
def test_a_bad_switch_changes_nothing(sparse, how, kwargs, error, message):
    before, plan = snapshot(sparse), sdm.get_plan(sparse)
    with pytest.raises(error, match=message):
        how(sparse, **kwargs)
    assert snapshot(sparse) == before
    assert sdm.get_plan(sparse) == plan


def test_tied_weights_switch_together():
    model = tied()
    sdm.sparsify(model, "2:4", policy="all")
    with pytest.raises(ValueError, match="share one weight"):
        sdm.set_pattern(model, "2:4", rules={"4": "1:4"})
    sdm.set_pattern(model, "1:4")
    assert patterns(model) == ["1:4"] * 4


def test_use_pattern_restores(sparse):
    sdm.set_pattern(sparse, "2:4", rules={"0": "1:4"})
    plan = sdm.get_plan(sparse)
    with sdm.use_pattern(sparse, "dense") as inside:
        assert patterns(sparse) == ["dense"] * 3
        assert sdm.get_plan(sparse) == inside
        with sdm.use_pattern(sparse, "4:8"):
            assert patterns(sparse) == ["4:8"] * 3
        assert patterns(sparse) == ["dense"] * 3
    assert patterns(sparse) == ["1:4", "2:4", "2:4"]
    assert sdm.get_plan(sparse) == plan


def test_use_pattern_restores_after_an_error(sparse):
    with pytest.raises(KeyError), sdm.use_pattern(sparse, "1:4"):
        raise KeyError
    assert patterns(sparse) == ["2:4"] * 3


@pytest.mark.parametrize("call", [lambda m: sdm.set_pattern(m, "2:4"), sdm.get_plan])
def test_a_dense_model_has_no_plan(call):
    with pytest.raises(ValueError, match=r"not sparse: call sparsify\(model, pattern\) first"):
        call(net())


def test_use_pattern_of_a_dense_model():
    with pytest.raises(ValueError, match="not sparse"), sdm.use_pattern(net(), "2:4"):
        pass


# --- functorch -----------------------------------------------------------------------------------------------------


def test_functional_call_and_vmap(sparse):
    x = torch.randn(5, 48)
    weights = [{k: v.detach() + i for k, v in sparse.named_parameters()} for i in range(2)]
    stacked = {k: torch.stack([w[k] for w in weights]) for k in weights[0]}
    got = torch.func.vmap(lambda w: torch.func.functional_call(sparse, w, (x,)))(stacked)
    for i in range(2):
        torch.testing.assert_close(got[i], torch.func.functional_call(sparse, weights[i], (x,)), rtol=1e-4, atol=1e-4)


def test_uvit_end_to_end_in_eager():
    model = create_uvit("uvit-s/2", embed_dim=64, depth=2, num_heads=4).eval()
    reference = copy.deepcopy(model)
    plan = sdm.sparsify(model, "2:4", policy="sparsedm")
    for name in plan.patterns():
        weight = reference.get_parameter(f"{name}.weight")
        weight.data = masked(weight.data, "2:4")
    inputs = example_inputs(model, 2)
    torch.testing.assert_close(model(*inputs), reference(*inputs), rtol=1e-5, atol=1e-5)
