"""nn.Conv1d and nn.Conv3d from sparsify to a packed checkpoint, against float64 convolutions of the masked weights."""

import copy

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.kernels import LayerSpec, get_kernel
from sparsedm_compile.kernels.registry import with_height
from sparsedm_compile.pattern import Pattern

SPEC = LayerSpec("conv3d", (8, 8, 1, 1, 1), Pattern(2, 4))
needs_compiler = pytest.mark.skipif(get_kernel("cpu").refusal(SPEC) is not None, reason="no C++ compiler here")


class Audio(nn.Module):
    """Convolutions over time."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv1d(16, 32, 4, stride=2, padding=1)
        self.dilated = nn.Conv1d(32, 32, 3, padding="same", dilation=2)
        self.wrapped = nn.Conv1d(32, 32, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        x = nn.functional.silu(self.down(x))
        return self.wrapped(x + nn.functional.gelu(self.dilated(x)))


class Video(nn.Module):
    """A factorised convolution over space and time, as video models have, and layers that stay dense."""

    def __init__(self):
        super().__init__()
        self.space = nn.Conv3d(16, 32, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.time = nn.Conv3d(32, 32, (3, 1, 1), padding="same", dilation=(2, 1, 1))
        self.both = nn.Conv3d(32, 16, 3, padding=1)
        self.grouped = nn.Conv3d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose3d(16, 16, 2, stride=2)

    def forward(self, x):
        x = nn.functional.silu(self.space(x))
        return self.up(self.grouped(self.both(x + self.time(x))))


MODELS = {"conv1d": (Audio, (2, 16, 41)), "conv3d": (Video, (2, 16, 5, 9, 11))}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, shape = MODELS[request.param]
    model = model().eval()
    return model, torch.randn(shape)


def exact(model, x, masked_dense):
    with torch.no_grad():
        return masked_dense(model).double()(x.double())


def test_the_plan_names_every_layer_and_why_one_stays_dense(case):
    model, _ = case
    plan = sdm.sparsify(model, "2:4", policy="all")
    kinds = {layer.name: layer.kind for layer in plan if not layer.pattern.is_dense}
    if "down" in plan:
        assert kinds == {"down": "conv1d", "dilated": "conv1d", "wrapped": "conv1d"}
        assert isinstance(model.down, sdm.SparseConv1d)
    else:
        assert kinds == dict.fromkeys(("space", "time", "both", "grouped"), "conv3d")
        assert isinstance(model.both, sdm.SparseConv3d)
        assert plan["up"].reason == "ConvTranspose3d has no sparse kernel"


@needs_compiler
@pytest.mark.parametrize("pattern", ["2:4", "1:4v4"])
def test_compiled_on_the_sparse_kernel(case, pattern, masked_dense):
    model, x = case
    sdm.sparsify(model, pattern, policy="all")
    want = exact(model, x, masked_dense)
    compiled = torch.compile(model, backend="sparsedm", options={"kernel": "cpu"})
    report = sdm.explain(compiled, x)
    for layer in report.layers:
        if layer.name in ("grouped", "up"):
            assert layer.kernel == "dense"
            assert "one group, not 4" in layer.reason or "no sparse kernel" in layer.reason
        else:
            assert layer.kernel == "cpu", layer
    with torch.no_grad():
        got = compiled(x)
    assert got.stride() == model(x).stride()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_measured_choice(case, masked_dense):
    model, x = case
    sdm.sparsify(model, "2:4", policy="all")
    want = exact(model, x, masked_dense)
    with torch.no_grad():
        got = torch.compile(model, backend="sparsedm")(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_packed_and_loaded_again(case, masked_dense):
    model, x = case
    sdm.sparsify(model, "2:4", policy="all")
    want = exact(model, x, masked_dense)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    sdm.pack(model)
    sdm.pack(other)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for packed in (model, other, copy.deepcopy(model)):
            torch.testing.assert_close(packed(x).double(), want, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(model, backend="sparsedm", fullgraph=True)
        torch.testing.assert_close(compiled(x).double(), want, rtol=1e-5, atol=1e-5)


def test_training_goes_straight_through(case):
    model, x = case
    sdm.sparsify(model, "2:4", policy="all")
    model(x).square().mean().backward()
    layer = model.both if hasattr(model, "both") else model.dilated
    assert (layer.weight.grad != 0).all()


def test_masks_chosen_by_what_layers_see(case):
    model, x = case
    sdm.sparsify(model, "2:4", policy="all")
    report = sdm.select_masks(model, [CalibrationBatch((x,), x)])
    assert {layer.name for layer in report.layers} == {
        name for name, layer in model.named_modules() if hasattr(layer, "pattern")
    }


def test_an_image_without_a_batch_runs_dense():
    layer = nn.Conv3d(32, 32, 3, padding=1).eval()
    sdm.sparsify(layer, "2:4", policy="all")
    x = torch.randn(32, 4, 5, 6)
    with torch.no_grad():
        want = layer(x)
    report = sdm.explain(torch.compile(layer, backend="sparsedm", options={"kernel": "cpu"}), x)
    assert report[""].reason == "the input is one image without a batch dimension"
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="sparsedm")(x), want)


def test_other_kernels_name_why_they_refuse_three_dimensions():
    for name in ("cuda", "triton"):
        spec = LayerSpec(
            "conv3d", (64, 64, 3, 3, 3), Pattern(2, 4, 64 if name == "triton" else 1), torch.float16, "cuda"
        )
        assert "not three" in get_kernel(name).refusal(spec)
    for name in ("cusparselt", "triton_packed"):
        spec = LayerSpec("conv3d", (64, 64, 1, 1, 1), Pattern(2, 4), torch.float16, "cuda", (1, 1, 1), (0, 0, 0))
        assert "1x1 convolutions of stride 1" in get_kernel(name).refusal(spec)


def test_with_height():
    assert with_height((8, 4, 3), (2,), (1,), (1,)) == ((8, 4, 1, 3), (1, 2), (0, 1), (1, 1))
    assert with_height((8, 4, 3, 3, 3), (2, 1, 1), (1, 1, 1), (1, 1, 1))[0] == (8, 4, 3, 3, 3)
