import copy
import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsedm_compile.calibration import CalibrationBatch, calibration_set
from sparsedm_compile.layers import layer_pattern, sparse_layers
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.models import UViT
from sparsedm_compile.pack import pack
from sparsedm_compile.selection import select, select_masks
from sparsedm_compile.sparsify import set_pattern, sparsify

METHODS = ("magnitude", "wanda", "sparsegpt")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches_of(*inputs: torch.Tensor) -> list[CalibrationBatch]:
    return [CalibrationBatch((x,), x) for x in inputs]


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // 2, generator=generator) @ torch.randn(
        columns // 2, columns, generator=generator
    ) + 0.3 * torch.randn(rows, columns, generator=generator)


def tiny_uvit() -> tuple[UViT, list[CalibrationBatch]]:
    torch.manual_seed(0)
    model = UViT(img_size=4, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2)
    data = torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return model, calibration_set([data], samples=24, batch=10)


def snapshot(model: nn.Module) -> tuple:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    patterns = {name: layer.pattern for name, layer in sparse_layers(model).items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return state, modes, patterns, hooks


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    state, *others = snapshot(model)
    assert list(others) == list(before[1:])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())


class TestMasksAreCarriedByTheWeights:
    @settings(deadline=None, max_examples=40)
    @given(
        kind=st.sampled_from(["linear", "conv2d", "grouped"]),
        pattern=st.sampled_from(["2:4", "1:4", "2:4v2", "1:2v4", "3:8"]),
        method=st.sampled_from(METHODS),
        refit=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 1000),
    )
    def test_for_any_layer_pattern_and_method(self, kind, pattern, method, refit, dtype, seed):
        torch.manual_seed(seed)
        layer = {
            "linear": lambda: nn.Linear(16, 8),
            "conv2d": lambda: nn.Conv2d(8, 8, 3, padding=1),
            "grouped": lambda: nn.Conv2d(16, 8, (1, 2), groups=2),
        }[kind]().to(dtype)
        with torch.no_grad():
            layer.weight[:, :5] *= torch.randint(2, layer.weight[:, :5].shape)  # zeros among what is kept: ties
        shape = {"linear": (40, 16), "conv2d": (2, 8, 5, 5), "grouped": (2, 16, 5, 5)}[kind]
        model = nn.Sequential(layer)
        sparsify(model, pattern, policy="all")
        (row,) = select_masks(model, batches_of(torch.randn(shape).to(dtype)), method, refit=refit, progress=False)
        weight = model[0].weight.detach()
        assert torch.equal(mask_out(weight, pattern), weight)  # what the layer computes with is what was chosen
        kept = (weight != 0).movedim(1, -1).unflatten(-1, (-1, layer_pattern(model[0]).m))
        assert (kept.sum(-1) <= layer_pattern(model[0]).n).all()
        assert 0 <= row.moved <= 1

    def test_magnitude_keeps_its_masks_and_its_weights(self):
        model, calibration = tiny_uvit()
        sparsify(model, "2:4v2", policy="sparsedm")
        masked = {name: mask_out(layer.weight, "2:4v2") for name, layer in sparse_layers(model).items()}
        report = select_masks(model, calibration, "magnitude", refit=False, progress=False)
        assert all(torch.equal(layer.weight, masked[name]) for name, layer in sparse_layers(model).items())
        assert all((row.error, row.moved) == (row.magnitude_error, 0) for row in report)

    def test_refitted_magnitude_keeps_its_masks(self):
        model, calibration = tiny_uvit()
        sparsify(model, "2:4", policy="sparsedm")
        masks = {name: magnitude_mask(layer.weight, "2:4") for name, layer in sparse_layers(model).items()}
        report = select_masks(model, calibration, "magnitude", progress=False)
        assert all(torch.equal(layer.weight != 0, masks[name]) for name, layer in sparse_layers(model).items())
        assert all(row.error < row.magnitude_error and row.moved == 0 for row in report)


class TestModels:
    @pytest.mark.parametrize("method", METHODS)
    def test_plans_that_mix_patterns(self, method):
        model, calibration = tiny_uvit()
        plan = sparsify(
            model, "2:4", policy="sparsedm", rules={"*.mlp.fc1": "1:4", "*.mlp.fc2": "2:4v4", "mid_block.*": "dense"}
        )
        before = copy.deepcopy(model)
        report = select_masks(model, calibration, method, progress=False)
        assert [row.name for row in report] == list(plan.patterns())
        assert {row.name: row.pattern for row in report} == {n: str(p) for n, p in plan.patterns().items()}
        for name, tensor in model.state_dict().items():
            layer = name.removesuffix(".weight")
            share = (tensor != 0).double().mean().item()
            if layer in plan.patterns() and name != layer:
                assert share == pytest.approx(plan[layer].pattern.density, abs=0.01)
            else:
                assert torch.equal(tensor, before.state_dict()[name])

    def test_figures_are_those_of_the_layers_outputs(self):
        model, calibration = tiny_uvit()
        seen: dict[str, list[torch.Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda _m, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
                )
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                model(*batch.inputs)
        dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        inputs = {name: torch.cat(parts).double() for name, parts in seen.items()}
        sparsify(model, "2:4", policy="sparsedm")
        for row in select_masks(model, calibration, progress=False):
            x, w = inputs[row.name], dense[f"{row.name}.weight"].double()
            now = model.get_submodule(row.name).weight.detach().double()
            for figure, v in ((row.magnitude_error, mask_out(w, "2:4")), (row.error, now)):
                assert figure == pytest.approx(((x @ (w - v).T).norm() / (x @ w.T).norm()).item(), rel=1e-6)

    @pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4v2"])
    def test_errors_fall_from_magnitude_to_wanda_to_sparsegpt_to_refitted(self, pattern):
        x = correlated(300, 32) * torch.logspace(-1, 1, 32)
        errors = {}
        for method in METHODS:
            for refit in (False, True):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(32, 24))
                sparsify(model, pattern, policy="all")
                (row,) = select_masks(model, batches_of(x[:200], x[200:]), method, refit=refit, progress=False)
                errors[method, refit] = row.error
                assert row.magnitude_error == errors["magnitude", False]
        assert errors["wanda", False] < errors["magnitude", False]
        assert errors["sparsegpt", False] < errors["wanda", False]
        assert all(errors[method, True] < errors[method, False] for method in METHODS)
        assert errors["sparsegpt", True] == min(errors.values())

    @pytest.mark.parametrize("method", METHODS)
    def test_a_convolution_is_the_linear_layer_of_its_patches(self, method):
        """Patches cut out by hand, C_in fastest, as input of a linear layer that holds the same weights."""
        torch.manual_seed(0)
        conv = nn.Conv2d(8, 4, 2, bias=False)
        x = torch.randn(3, 8, 4, 5)
        linear = nn.Linear(32, 4, bias=False)
        with torch.no_grad():
            linear.weight.copy_(conv.weight.permute(0, 2, 3, 1).reshape(4, 32))
        patches = torch.stack(
            [
                x[b, :, i : i + 2, j : j + 2].permute(1, 2, 0).flatten()
                for b in range(3)
                for i in range(3)
                for j in range(4)
            ]
        )
        rows = []
        for layer, inputs in ((conv, x), (linear, patches)):
            model = nn.Sequential(layer)
            sparsify(model, "2:4v2", policy="all")
            rows.append(select_masks(model, batches_of(inputs), method, progress=False).layers[0])
        torch.testing.assert_close(conv.weight.permute(0, 2, 3, 1).reshape(4, 32), linear.weight, rtol=1e-5, atol=1e-6)
        assert rows[0].error == pytest.approx(rows[1].error, rel=1e-5)

    def test_layers_that_share_a_weight_get_one_mask_from_both_inputs(self):
        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
                self.b.weight = self.a.weight

            def forward(self, x, y):
                return self.a(x) + self.b(y)

        torch.manual_seed(0)
        model, x, y = Shared(), torch.randn(20, 8), torch.randn(20, 8) * torch.logspace(-2, 2, 8)
        alone = nn.Sequential(copy.deepcopy(model.a))
        sparsify(model, "2:4", policy="all")
        sparsify(alone, "2:4", policy="all")
        report = select_masks(model, [CalibrationBatch((x, y), x)], progress=False)
        select_masks(alone, batches_of(x, y), progress=False)
        assert model.a.weight is model.b.weight
        assert torch.equal(model.a.weight, alone[0].weight)
        assert [row.name for row in report] == ["a", "b"]
        assert report.layers[0].error == report.layers[1].error

    def test_one_gram_matrix_at_a_time_gives_the_same(self, monkeypatch):
        weights = []
        for limit in (select._GRAM_BYTES, 1):
            monkeypatch.setattr(select, "_GRAM_BYTES", limit)
            model, calibration = tiny_uvit()
            sparsify(model, "2:4", policy="sparsedm")
            select_masks(model, calibration, progress=False)
            weights.append(model.state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_a_layer_that_sees_nothing_keeps_its_magnitude_mask(self):
        for method in ("magnitude", "sparsegpt"):
            model = nn.Sequential(nn.Linear(8, 4))
            sparsify(model, "2:4", policy="all")
            expected = mask_out(model[0].weight.detach(), "2:4")
            (row,) = select_masks(model, batches_of(torch.zeros(5, 8)), method, progress=False)
            torch.testing.assert_close(model[0].weight.detach(), expected)
            assert row.error == 0

    def test_dropout_is_off_and_modes_return(self):
        def run(p):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Dropout(p), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
            model[1].eval()
            sparsify(model, "2:4", policy="all")
            before = snapshot(model)
            select_masks(
                model, batches_of(torch.randn(30, 8, generator=torch.Generator().manual_seed(1))), progress=False
            )
            assert snapshot(model)[1:] == before[1:]
            return model.state_dict()

        one, other = run(0.0), run(0.9)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one["2.num_batches_tracked"] == 0

    def test_a_compiled_model_is_seen_through(self):
        """Dynamo does not notice hooks that are added after it compiled, on the whole or on a part of a model."""
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)), correlated(20, 8)
        sparsify(model, "2:4", policy="all")
        plain = copy.deepcopy(model)
        model[0].compile(backend="eager")
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(x)
            model(x)
            assert len(select_masks(compiled, batches_of(x), progress=False)) == 2
            select_masks(plain, batches_of(x), progress=False)
            assert torch.equal(compiled(x), plain(x))

    def test_singular_inputs_are_damped_and_told(self, caplog):
        model = nn.Sequential(nn.Linear(16, 4))
        sparsify(model, "2:4", policy="all")
        with caplog.at_level(logging.WARNING, logger="sparsedm_compile"):
            select_masks(model, batches_of(torch.ones(3, 16)), damping=1e-30, progress=False)
        assert "layer '0': Hessian singular at damping 1.0e-30, taking" in caplog.text
        assert torch.isfinite(model[0].weight).all()


class TestReport:
    def test_prints_as_a_table_and_is_json(self):
        model, calibration = tiny_uvit()
        sparsify(model, "2:4", policy="sparsedm")
        report = select_masks(model, calibration, "wanda", progress=False)
        text = str(report)
        assert "mask selection: wanda, refitted, 24 samples" in text
        assert "in_blocks.0.attn.qkv" in text
        assert "12 of 12 layers with a smaller output error than by magnitude" in text
        data = json.loads(json.dumps(report.to_dict()))
        assert (data["method"], data["samples"], len(data["layers"])) == ("wanda", 24, len(report))
        assert data["layers"][0]["error"] == report.layers[0].error


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"method": "wander"}, ValueError, "unknown method 'wander'; choose one of magnitude, wanda, sparsegpt"),
            ({"damping": 0.0}, ValueError, "damping must be a positive number, got 0.0"),
            ({"damping": float("nan")}, ValueError, "damping must be a positive number, got nan"),
            ({"calibration": []}, ValueError, "calibration is empty"),
            ({"calibration": [torch.ones(2, 8)]}, TypeError, r"got Tensor; make it by calibration_set\(batches\)"),
        ],
    )
    def test_arguments(self, options, error, message):
        model = nn.Sequential(nn.Linear(8, 4))
        sparsify(model, "2:4", policy="all")
        before = snapshot(model)
        with pytest.raises(error, match=message):
            select_masks(model, **{"calibration": batches_of(torch.ones(2, 8)), **options})
        assert_unchanged(model, before)

    def test_models(self):
        calibration = batches_of(torch.ones(2, 8))
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
            select_masks("model", calibration)
        model = nn.Sequential(nn.Linear(8, 4))
        with pytest.raises(ValueError, match=r"call sparsify\(model, pattern\) first"):
            select_masks(model, calibration)
        sparsify(model, "2:4", policy="all")
        set_pattern(model, "dense")
        with pytest.raises(ValueError, match="every layer's pattern is dense"):
            select_masks(model, calibration)
        set_pattern(model, "2:4")
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="layer '0' has weights that are not finite"):
            select_masks(model, calibration)
        with torch.no_grad():
            model[0].weight[0, 0] = 1
        pack(model)
        with pytest.raises(ValueError, match="model is packed"):
            select_masks(model, calibration)

    @pytest.mark.parametrize("limit", [1, 1 << 30])
    def test_a_failure_half_way_leaves_the_model_as_it_was(self, limit, monkeypatch):
        """With a bundle for each layer the first layers are done when a later one fails."""
        monkeypatch.setattr(select, "_GRAM_BYTES", limit)
        model, calibration = tiny_uvit()
        sparsify(model, "2:4", policy="sparsedm")
        with torch.no_grad():
            model.mid_block.norm1.bias[0] = float("inf")  # what the last block sees is NaN
        model.train()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"layer 'mid_block.attn.qkv' sees inputs that are not finite"):
            select_masks(model, calibration, progress=False)
        assert_unchanged(model, before)
        with pytest.raises(ValueError, match="this U-ViT takes"):
            select_masks(model, [*calibration, CalibrationBatch((torch.ones(1, 3), torch.ones(1)), torch.ones(1))])
        assert_unchanged(model, before)

    def test_a_layer_that_is_not_called(self):
        model, calibration = tiny_uvit()
        model.spare = nn.Linear(8, 8)
        sparsify(model, "2:4", policy="all")
        before = snapshot(model)
        with pytest.raises(ValueError, match="layer 'spare' is not called"):
            select_masks(model, calibration, progress=False)
        assert_unchanged(model, before)

    def test_weights_beyond_the_range_of_their_dtype(self):
        """Four inputs all but equal: the kept weight takes the sum of four, which float16 cannot hold."""
        model = nn.Sequential(nn.Linear(4, 1, bias=False)).half()
        with torch.no_grad():
            model[0].weight.fill_(60_000)
        sparsify(model, "1:4", policy="all")
        before = snapshot(model)
        x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).expand(50, 4).half() / 1e5
        with pytest.raises(
            ValueError, match=r"layer '0': new weights exceed the range of torch.float16; raise damping"
        ):
            select_masks(model, batches_of(x), progress=False)
        assert_unchanged(model, before)
