"""swap_kernels: packed weights as inputs, looked up by weight; dense where no kernel can."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.passes import find_layers, insert_masks, swap_kernels
from sparsedm_compile.pattern import Pattern

PASSES = [find_layers, insert_masks, swap_kernels]


def sparse(*layers, pattern="2:4"):
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    sdm.sparsify(model, pattern, policy="all")
    return model


@pytest.mark.parametrize("kernel", ["cpu", "onednn", "reference", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_the_same(lower, kernel, bias):
    model = sparse(nn.Conv2d(32, 32, 3, padding=1, stride=2, bias=bias), nn.Flatten(2), nn.Linear(16, 32, bias=bias))
    x = torch.randn(2, 32, 8, 8)
    _, output = lower(model, [x], PASSES, kernel=kernel)
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["cpu", "onednn", "reference", "dense"])
def test_a_channels_last_model_answers_in_channels_last(lower, kernel):
    model = sparse(nn.Conv2d(32, 32, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8)  # the weight alone decides, as it does in dense
    _, output = lower(model, [x], PASSES, kernel=kernel)
    with torch.no_grad():
        want = model(x)
    assert output.stride() == want.stride() == (2048, 1, 256, 32)
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["cpu", "reference", "dense"])
def test_a_kernel_of_one_pixel_answers_as_the_input_lies(lower, targets, kernel):
    model = sparse(nn.Conv2d(32, 32, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 8, 8)
    lowering, output = lower(model, [x], PASSES, kernel=kernel)
    with torch.no_grad():
        want = model(x)
    assert output.stride() == want.stride() == (2048, 64, 8, 1)
    assert len(targets(lowering)) == 1  # no copy of the input
    torch.testing.assert_close(output, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "skipping"), [("cpu", 2), ("dense", 0)])
def test_a_compilation_is_heard_of_before_and_after(lower, caplog, capsys, kernel, skipping):
    model = sparse(nn.Linear(32, 32), nn.Linear(32, 32))
    with caplog.at_level(logging.INFO, "sparsedm_compile.passes.swap_kernels"):
        lower(model, [torch.randn(2, 32)], PASSES, kernel=kernel)
    first, last = (record.getMessage() for record in caplog.records if record.name.endswith(".swap_kernels"))
    assert first.startswith("measuring kernels for 2 layers")
    assert re.fullmatch(rf"2 layers measured and packed in \d+\.\d s, {skipping} of them sparse; now Inductor", last)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_no_mask_is_left_in_the_graph(lower, targets, kernel):
    lowering, _ = lower(sparse(nn.Linear(32, 32)), [torch.randn(2, 32)], PASSES, kernel=kernel)
    assert targets(lowering) == ["linear.default"]
    assert lowering.layers[0].node.target is torch.ops.sparsedm.linear.default
    assert lowering.layers[0].verdict.kernel == kernel


def test_dense_takes_the_masked_weight_as_an_input(lower, targets):
    lowering, _ = lower(sparse(nn.Linear(32, 32)), [torch.randn(2, 32)], PASSES, kernel="dense")
    assert targets(lowering) == ["linear"]
    (derived,) = lowering.derived
    dense = lowering.example_inputs[derived.weight_position]
    (masked,) = derived.build(dense)
    assert torch.equal(masked, dense * magnitude_mask_naive(dense, Pattern(2, 4)))
    weight = lowering.layers[0].node.args[1]
    assert weight.op == "placeholder"
    assert weight is not lowering.layers[0].weight


def test_the_new_inputs_follow_dynamos_and_belong_to_their_weights(lower):
    model = sparse(nn.Linear(32, 64), nn.Linear(64, 32))
    lowering, _ = lower(model, [torch.randn(2, 32)], PASSES, kernel="reference")
    placeholders = lowering.gm.graph.find_nodes(op="placeholder", sort=True)
    assert len(placeholders) == len(lowering.example_inputs)
    for derived, module in zip(lowering.derived, model, strict=True):
        assert lowering.example_inputs[derived.weight_position] is module.weight
        values, index = derived.build(module.weight)
        assert values.shape == (module.out_features, module.in_features // 2)
        assert index.dtype == torch.uint8


def test_a_weight_used_twice_is_packed_once(lower):
    layer = nn.Linear(32, 32)
    sdm.sparsify(layer, "2:4")
    x = torch.randn(2, 32)
    lowering, output = lower(lambda x: layer(layer(x)), [x], PASSES, kernel="reference")
    assert len(lowering.derived) == 1
    with torch.no_grad():
        torch.testing.assert_close(output, layer(layer(x)))


def test_one_weight_in_two_convolutions_of_other_constants(lower):
    one, two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2)
    two.weight = one.weight
    model = sparse(one, two)
    x = torch.randn(1, 32, 8, 8)
    _, output = lower(model, [x], PASSES, kernel="onednn")
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_the_forced_kernel_cannot_take_stays_dense_and_says_why(lower):
    model = sparse(nn.Conv2d(32, 32, 3, groups=2), nn.Conv2d(32, 32, 3))
    lowering, _ = lower(model, [torch.randn(1, 32, 9, 9)], PASSES, kernel="cpu")
    grouped, plain = lowering.layers
    assert (grouped.verdict.kernel, plain.verdict.kernel) == ("dense", "cpu")
    assert "one group" in grouped.verdict.reason


def test_plain_layers_take_part(lower):
    lowering, _ = lower(nn.Linear(32, 32), [torch.randn(2, 32)], PASSES, kernel="onednn")
    assert lowering.layers[0].verdict.kernel == "onednn"
    assert lowering.layers[0].spec.pattern.is_dense


def test_other_uses_of_a_mask_keep_it(lower, targets):
    layer = nn.Linear(32, 32)
    sdm.sparsify(layer, "2:4")

    def regularized(x):
        weight = sdm.masked_weight(layer.weight, "2:4")
        return F.linear(x, weight) + weight.abs().sum()

    x = torch.randn(2, 32)
    lowering, output = lower(regularized, [x], PASSES, kernel="reference")
    assert "masked_weight" in targets(lowering)[0]
    with torch.no_grad():
        torch.testing.assert_close(output, regularized(x))
