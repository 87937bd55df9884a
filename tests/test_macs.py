"""count_macs against the table of published shapes, torch's FLOP counter, closed forms, and its error messages."""

import json
import math
import time

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsedm_compile.kernels.ops  # noqa: F401  registers sparsedm::linear and sparsedm::conv
from sparsedm_compile.layers import SparseConv2d, SparseLinear
from sparsedm_compile.macs import count_macs
from sparsedm_compile.models import create_uvit, example_inputs, uvit_presets
from sparsedm_compile.pattern import Pattern

MASKED = ("qkv", "proj", "fc1", "fc2")


def on_meta(factory, *args, **kwargs):
    with torch.device("meta"):
        return factory(*args, **kwargs).eval()


def block_plan(model, layers=MASKED, pattern="2:4"):
    blocks = ("in_blocks.", "mid_block.", "out_blocks.")
    names = [name for name, _ in model.named_modules() if name.startswith(blocks)]
    return {name: pattern for name in names if name.rpartition(".")[2] in layers}


def row(report, name, kind=None):
    (found,) = [r for r in report.layers if r.name == name and kind in (None, r.kind)]
    return found


# --- the table -----------------------------------------------------------------------------------------------------


# GMACs at batch 1: linear + conv, attention, 2:4 as SparseDM trains it, 2:4 with the skip linears.
TABLE = {
    "uvit-s/2": ("11.32", "0.88", "6.07", "5.66"),
    "uvit-s/4": ("11.33", "0.88", "6.08", "5.67"),
    "uvit-m/4": ("33.50", "1.74", "17.98", "16.76"),
    "uvit-l/4": ("73.61", "2.86", "39.52", "36.82"),
    "uvit-l/2": ("73.59", "2.86", "39.51", "36.80"),
    "uvit-h/2": ("128.75", "4.45", "69.17", "64.38"),
    "uvit-l/4-512": ("73.62", "2.86", "39.53", "36.83"),
    "uvit-h/4": ("128.78", "4.45", "69.20", "64.41"),
    "uvit-t2i-s/2": ("14.74", "1.49", "7.92", "7.39"),  # attention: 13 blocks x 2 x 334^2 x 512 = 1.48503
}


def test_table_covers_every_preset():
    assert TABLE.keys() == uvit_presets().keys()


@pytest.mark.parametrize("preset", TABLE)
def test_reproduces_the_table(preset):
    model = on_meta(create_uvit, preset)
    inputs = example_inputs(model)
    as_trained = count_macs(model, *inputs, plan=block_plan(model))
    with_skip = count_macs(model, *inputs, plan=block_plan(model, (*MASKED, "skip_linear")))
    counts = (as_trained.dense, as_trained.attention, as_trained.sparse, with_skip.sparse)
    assert tuple(f"{count / 1e9:.2f}" for count in counts) == TABLE[preset]
    assert with_skip.dense == as_trained.dense


def ddpm_unet():
    """The UNet that SparseDM prunes: width 112, attention at strides 8 and 16, affine time conditioning."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(112, 224, 224, 448, 448),
        layers_per_block=2,
        norm_num_groups=28,
        attention_head_dim=112,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 3,
    )


def test_reproduces_the_table_for_the_ddpm_unet():
    report = count_macs(on_meta(ddpm_unet), torch.zeros(1, 3, 32, 32), 10)
    assert f"{report.dense / 1e9:.2f}" == "4.99"
    assert f"{report.attention / 1e9:.3f}" == "0.001"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("preset", ["uvit-s/2", "uvit-m/4", "uvit-h/4", "uvit-t2i-s/2"])
def test_uvit_closed_form(preset, batch):
    config = uvit_presets()[preset]
    d, depth, patch, channels = config["embed_dim"], config["depth"], config["patch_size"], config["in_chans"]
    patches = (config["img_size"] // patch) ** 2
    text = config.get("num_clip_token", 0)
    tokens = patches + 1 + text + ("num_classes" in config)
    dense = (depth + 1) * tokens * 12 * d * d + depth // 2 * tokens * 2 * d * d
    dense += patches * patch**2 * channels * d + tokens * d * patch**2 * channels + text * 768 * d
    if config.get("conv", True):
        dense += config["img_size"] ** 2 * 9 * channels**2
    report = count_macs(on_meta(create_uvit, preset), *example_inputs(preset, batch))
    assert report.dense == report.sparse == batch * dense
    assert report.attention == batch * (depth + 1) * 2 * tokens**2 * d


# --- torch's FLOP counter ------------------------------------------------------------------------------------------


def unet2d():
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def unet2d_condition():
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=64,
        caption_channels=24,
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        in_channels=4,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=20,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
    )


def flux(**config):
    small = {
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
        "in_channels": 8,
        "guidance_embeds": True,
    }
    return FluxTransformer2DModel(**small | config)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="meta")


def flux_inputs(model, tokens, text):
    config = model.config
    return {
        "hidden_states": zeros(1, tokens, config.in_channels),
        "timestep": zeros(1),
        "guidance": zeros(1),
        "encoder_hidden_states": zeros(1, text, config.joint_attention_dim),
        "img_ids": zeros(tokens, 3),
        "pooled_projections": zeros(1, config.pooled_projection_dim),
        "txt_ids": zeros(text, 3),
    }


MODELS = {
    "UNet2DModel": (unet2d, lambda _: {"sample": zeros(2, 3, 16, 16), "timestep": zeros(2)}),
    "UNet2DConditionModel": (
        unet2d_condition,
        lambda _: {"sample": zeros(2, 4, 16, 16), "timestep": zeros(2), "encoder_hidden_states": zeros(2, 7, 24)},
    ),
    "DiTTransformer2DModel": (
        dit,
        lambda _: {
            "hidden_states": zeros(2, 4, 8, 8),
            "timestep": zeros(2),
            "class_labels": zeros(2, dtype=torch.int64),
        },
    ),
    "PixArtTransformer2DModel": (
        pixart,
        lambda _: {
            "hidden_states": zeros(2, 4, 8, 8),
            "timestep": zeros(2),
            "encoder_hidden_states": zeros(2, 5, 24),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": (
        sd3,
        lambda _: {
            "hidden_states": zeros(2, 4, 8, 8),
            "timestep": zeros(2),
            "encoder_hidden_states": zeros(2, 5, 24),
            "pooled_projections": zeros(2, 20),
        },
    ),
    "FluxTransformer2DModel": (flux, lambda model: flux_inputs(model, 16, 5)),
    "UViT": (
        lambda: create_uvit("uvit-m/4", embed_dim=64, depth=4, num_heads=4),
        lambda model: dict(zip(("x", "timesteps", "y"), example_inputs(model, 2, "meta"), strict=True)),
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        lambda _: dict.fromkeys(("query", "key", "value"), zeros(2, 6, 32)),
    ),
    "grouped and transposed convolutions": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, groups=4), nn.ConvTranspose2d(16, 6, 4, 2, groups=2)),
        lambda _: {"input": zeros(2, 8, 9, 7)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_flop_counter_of_torch(name):
    factory, make_inputs = MODELS[name]
    model = on_meta(factory)
    inputs = make_inputs(model)
    report = count_macs(model, **inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert 2 * (report.dense + report.attention) == counter.get_total_flops() > 0
    by_operator = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in by_operator.items() if "bmm" in op.__name__)
    assert 2 * report.attention == products  # on meta, attention decomposes to bmm and nothing else does here


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_convolution_closed_form(data):
    groups = data.draw(st.sampled_from([1, 2, 4]))
    c_in, c_out = (groups * data.draw(st.integers(1, 4)) for _ in range(2))
    dims = data.draw(st.integers(1, 3))
    kernel = data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        c_in,
        c_out,
        kernel,
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.integers(0, 2)),
        dilation=data.draw(st.integers(1, 2)),
        groups=groups,
    )
    x = torch.zeros(data.draw(st.integers(1, 3)), c_in, *(9, 8, 7)[:dims])
    dense = conv(x).numel() * c_in // groups * math.prod(kernel)
    report = count_macs(conv, x)
    assert (report.dense, report.sparse, report.layers[0].kind) == (dense, dense, f"conv{dims}d")
    if c_in // groups == 4:
        assert count_macs(conv, x, plan={"": "1:4"}).sparse == dense // 4


@settings(max_examples=20, deadline=None)
@given(lead=st.lists(st.integers(1, 5), max_size=3), bias=st.booleans(), contiguous=st.booleans())
def test_linear_closed_form_for_any_leading_dimensions(lead, bias, contiguous):
    x = torch.zeros(*lead, 8) if contiguous else torch.zeros(8, *lead).movedim(0, -1)
    report = count_macs(nn.Linear(8, 12, bias=bias), x)
    assert (report.dense, report.attention) == (torch.Size(lead).numel() * 8 * 12, 0)


# --- which layer a product belongs to ------------------------------------------------------------------------------


def test_attention_is_attributed_to_its_module():
    model = on_meta(create_uvit, "uvit-s/2")
    report = count_macs(model, *example_inputs(model))
    assert row(report, "mid_block.attn", "attention").dense == 2 * 257**2 * 512
    assert row(report, "mid_block.attn.qkv").dense == 257 * 512 * 1536
    assert row(report, "final_layer").kind == "conv2d"
    assert report.attention == sum(r.dense for r in report.layers if r.kind == "attention")
    assert report.dense == sum(r.dense for r in report.layers if r.kind != "attention")


def test_encoder_layer_is_not_swallowed_by_its_fast_path():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    report = count_macs(model, torch.zeros(2, 6, 32))
    assert report.dense == 12 * (4 * 32 * 32 + 2 * 32 * 64)
    assert report.attention == 2 * 2 * 6 * 6 * 32
    assert row(report, "self_attn", "linear").dense == 12 * 3 * 32 * 32
    assert row(report, "self_attn.out_proj").dense == 12 * 32 * 32
    assert torch.backends.mha.get_fastpath_enabled()


class CastWeights(nn.Module):
    """Layers that are no nn.Linear: a weight scaled and cast at each use, and products of two activations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(24, 16))
        self.kernel = nn.Parameter(torch.zeros(3, 1, 3, 3))

    def forward(self, x, image):
        h = x.to(torch.bfloat16) @ (self.weight * 0.5).to(torch.bfloat16).t()
        return h @ h.transpose(-1, -2), F.conv2d(image, self.kernel / self.kernel.norm(), groups=3)


def test_weights_are_recognised_after_scaling_and_casting():
    report = count_macs(CastWeights(), torch.zeros(2, 5, 16), torch.zeros(1, 3, 6, 6))
    assert row(report, "", "linear").dense == 10 * 16 * 24
    assert row(report, "", "conv2d").dense == 3 * 4 * 4 * 9
    assert report.attention == 2 * 5 * 5 * 24


class LearnedTokens(nn.Module):
    """Both operands are weights: the product belongs to the linear. And a linear that keeps its weight to itself."""

    class Hidden(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.frozen)

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(6, 8))
        self.project = nn.Linear(8, 10, bias=False)
        self.hidden = self.Hidden(10, 4)
        self.hidden.frozen = torch.zeros(4, 10)

    def forward(self, x):
        return self.hidden(x + F.linear(self.tokens, self.project.weight))


def test_products_of_two_weights_and_unregistered_weights():
    report = count_macs(LearnedTokens(), torch.zeros(6, 10))
    assert (row(report, "project").dense, row(report, "hidden").dense) == (6 * 8 * 10, 6 * 10 * 4)
    assert report.attention == 0


def test_grouped_query_attention():
    class Attend(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    report = count_macs(Attend(), torch.zeros(2, 8, 5, 16), torch.zeros(2, 2, 7, 16), torch.zeros(2, 2, 7, 16))
    assert report.attention == 2 * 8 * 5 * 7 * (16 + 16)


def test_a_layer_called_twice_counts_its_macs_twice_and_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    report = count_macs(Twice(), torch.zeros(3, 8))
    assert row(report, "fc").dense == 2 * 3 * 64
    assert row(report, "unused").dense == 0
    assert report.params == 72 + 36


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    report = count_macs(model, torch.zeros(1, 8))
    assert (report.dense, report.params, report.dense_bytes) == (128, 64, 256)


# --- patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["1:4", "2:4", "4:8", "31:32", "2:4v4"])
def test_sparse_macs_parameters_and_bytes(spelling):
    pattern = Pattern.parse(spelling)
    model = nn.Sequential(nn.Conv2d(64, 32, 3, dtype=torch.bfloat16), nn.Flatten(), nn.Linear(32, 8).bfloat16())
    x = torch.zeros(2, 64, 3, 3, dtype=torch.bfloat16)
    report = count_macs(model, x, plan={"0": pattern, "2": spelling})
    conv, linear = 64 * 32 * 9, 32 * 8
    kept = (conv + linear) * pattern.n // pattern.m
    biases = 32 + 8
    assert (report.dense, report.sparse) == (2 * (conv + linear), 2 * kept)
    assert (report.params, report.kept_params) == (conv + linear + biases, kept + biases)
    assert report.dense_bytes == 2 * (conv + linear + biases)
    assert report.packed_bytes == 2 * (kept + biases) + kept // pattern.v
    assert [r.pattern for r in report.layers] == [spelling, spelling]
    assert sum(r.packed_bytes for r in report.layers) == report.packed_bytes


class SparseNet(nn.Module):
    def __init__(self, pattern=None):
        super().__init__()
        self.conv = SparseConv2d(8, 16, 3) if pattern else nn.Conv2d(8, 16, 3)
        self.fc = SparseLinear(16, 12) if pattern else nn.Linear(16, 12)
        if pattern:
            self.conv.pattern = self.fc.pattern = pattern

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sparse_layers_count_like_a_plan_on_the_dense_model(device):
    x = torch.zeros(2, 8, 6, 6)
    with torch.device(device):
        sparse, dense = SparseNet("1:4"), SparseNet()
    expected = count_macs(dense, x, plan={"conv": "1:4", "fc": "1:4"})
    assert count_macs(sparse, x) == expected
    assert expected.sparse * 4 == expected.dense == 2 * (16 * 16 * 72 + 16 * 12)
    assert count_macs(sparse, x, plan={"conv": "dense", "fc": "dense"}) == count_macs(dense, x)


def test_a_plan_object_is_asked_for_its_patterns():
    class Plan:
        def patterns(self):
            return {"fc": Pattern(2, 4)}

    report = count_macs(SparseNet(), torch.zeros(2, 8, 6, 6), plan=Plan())
    assert [r.pattern for r in report.layers] == ["dense", "2:4"]


class PackedNet(nn.Module):
    """Layers that hold packed tensors in place of weights."""

    class Linear(nn.Module):
        pattern, weight_shape = "2:4", (12, 16)

        def __init__(self):
            super().__init__()
            self.register_buffer("packed_values", torch.zeros(12, 8))
            self.register_buffer("packed_index", torch.zeros(12, 8, dtype=torch.uint8))
            self.bias = nn.Parameter(torch.zeros(12))

        def forward(self, x):
            return torch.ops.sparsedm.linear(
                x, self.packed_values, self.packed_index, "reference", self.pattern, self.weight_shape, self.bias
            )

    class Conv2d(nn.Module):
        pattern, weight_shape, bias = "2:4", (16, 8, 3, 3), None

        def __init__(self):
            super().__init__()
            self.register_buffer("packed_values", torch.zeros(16, 4, 3, 3))
            self.register_buffer("packed_index", torch.zeros(16, 4, 3, 3, dtype=torch.uint8))

        def forward(self, x):
            constants = ("reference", self.pattern, self.weight_shape, [1, 1], [0, 0], [1, 1], 1)
            return torch.ops.sparsedm.conv(x, self.packed_values, self.packed_index, *constants)

    def __init__(self):
        super().__init__()
        self.conv, self.fc = self.Conv2d(), self.Linear()

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_packed_layers_count_like_the_layers_they_were_packed_from():
    x = torch.zeros(2, 8, 6, 6)
    dense = SparseNet()
    dense.conv.bias = None
    assert count_macs(PackedNet(), x) == count_macs(dense, x, plan={"conv": "2:4", "fc": "2:4"})


# --- where it runs -------------------------------------------------------------------------------------------------


def test_a_model_of_twelve_billion_parameters_takes_seconds():
    model = on_meta(FluxTransformer2DModel, guidance_embeds=True)
    plan = {
        name: "2:4" for name, m in model.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in name
    }
    start = time.perf_counter()
    report = count_macs(model, **flux_inputs(model, 4096, 512), plan=plan)
    assert time.perf_counter() - start < 60  # 1.6 s on a quiet machine
    assert 11.8e9 < report.params < 12.0e9
    assert report.attention == (19 + 38) * 2 * (4096 + 512) ** 2 * 3072
    assert 0.5 < report.sparse / report.dense < 0.51


def test_every_mix_of_devices_and_modes_gives_the_same_count():
    model = create_uvit("uvit-m/4", embed_dim=32, depth=2, num_heads=4)
    meta = on_meta(create_uvit, "uvit-m/4", embed_dim=32, depth=2, num_heads=4)
    inputs, meta_inputs = example_inputs(model), example_inputs(model, device="meta")
    expected = count_macs(model, *inputs)
    assert count_macs(meta, *inputs) == expected
    assert count_macs(model, *meta_inputs) == expected
    assert count_macs(torch.compile(model), *inputs) == expected
    with torch.inference_mode():
        assert count_macs(model, *inputs) == expected
    with FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(t) for t in inputs]
        assert count_macs(meta, *fake_inputs) == expected
    with torch.device("meta"):
        assert count_macs(model, *inputs) == expected
    model.mid_block.compile(fullgraph=True)
    assert count_macs(model, *inputs) == expected
    assert count_macs(model.train().bfloat16(), *example_inputs(model)).dense == expected.dense


def test_leaves_the_model_and_the_random_state_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, state = [id(p) for p in model.parameters()], torch.get_rng_state()
    count_macs(model, torch.ones(2, 3, 8, 8))
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# --- the report ----------------------------------------------------------------------------------------------------


def test_report_as_json_and_as_table():
    model = on_meta(create_uvit, "uvit-s/2")
    report = count_macs(model, *example_inputs(model), plan=block_plan(model))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["dense"] == report.dense
    assert len(data["layers"]) == len(report.layers)
    numbers = [v for part in (data, *data["layers"]) for v in part.values() if not isinstance(v, (str, list))]
    assert all(type(v) is int for v in numbers)
    text = str(report)
    for expected in ("in_blocks.0.attn.qkv", "11.32 G dense, 6.07 G sparse (-46.4%)", "attention 879.24 M"):
        assert expected in text, expected


# --- errors --------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit():
    model = on_meta(create_uvit, "uvit-s/2")
    x, timesteps = example_inputs(model)
    with pytest.raises(ValueError, match=r"do not fit UViT\.forward: missing a required argument: 'timesteps'"):
        count_macs(model, x)
    with pytest.raises(ValueError, match=r"UViT.forward failed on tensors of shape \(1, 3, 32, 16\), \(1,\): x has"):
        count_macs(model, x[..., :16], timesteps)
    with pytest.raises(ValueError, match=r"Linear.forward failed on tensors of shape \(2, 5\)"):
        count_macs(nn.Linear(4, 4), torch.zeros(2, 5))


def test_a_model_that_reads_values():
    class Reads(nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    with pytest.raises(ValueError, match=r"a model that reads the values of a tensor \(.item\(\)\) cannot be counted"):
        count_macs(Reads(), torch.ones(3))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"fcc": "2:4"}, r"the model has no layer 'fcc'; did you mean fc\?"),
        (
            {"head.out.weight": "2:4"},
            "the model has no layer 'head.out.weight'; names are those of model.named_modules",
        ),
        ({"": "2:4"}, "layer '' cannot be 2:4: SparseNet is neither Linear nor Conv1d, Conv2d or Conv3d"),
        ({"fc": "1:32"}, "layer 'fc' cannot be 1:32: input width 16 is not a multiple of 32; leave it out of the plan"),
        ({"fc": "2:4v8"}, "layer 'fc' cannot be 2:4v8: output width 12 is not a multiple of v = 8"),
        ({"fc": "half"}, "unknown pattern 'half'"),
    ],
)
def test_plans_that_do_not_fit(plan, message):
    with pytest.raises(ValueError, match=message):
        count_macs(SparseNet(), torch.zeros(1, 8, 6, 6), plan=plan)


def test_arguments_of_the_wrong_type():
    with pytest.raises(TypeError, match="plan must map layer names to patterns, got str"):
        count_macs(SparseNet(), torch.zeros(1, 8, 6, 6), plan="2:4")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        count_macs(on_meta, torch.zeros(1))
