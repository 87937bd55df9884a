"""Whole models: one graph each, sparse equal to masked-dense, and explain lists every layer."""

import diffusers
import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.models import create_uvit, example_inputs


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet():
    model = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": randn(2, 3, 16, 16), "timestep": torch.tensor([3, 700])}


def unet_condition():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=64,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = {"sample": randn(2, 4, 16, 16), "timestep": torch.tensor([3, 700])}
    return model, inputs | {"encoder_hidden_states": randn(2, 7, 64)}


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=10
    )
    inputs = {"hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    return model, inputs | {"class_labels": torch.tensor([1, 9])}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, sample_size=8, cross_attention_dim=64,
        caption_channels=48, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700])}
    none = {"resolution": None, "aspect_ratio": None}
    return model, inputs | {"encoder_hidden_states": randn(2, 7, 48), "added_cond_kwargs": none}


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=32, in_channels=4, out_channels=4,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 700.0])}
    return model, inputs | {"encoder_hidden_states": randn(2, 7, 32), "pooled_projections": randn(2, 32)}


def flux():
    model = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        pooled_projection_dim=32, in_channels=16, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    inputs = {"hidden_states": randn(2, 16, 16), "timestep": torch.tensor([0.3, 0.7]), "guidance": torch.ones(2)}
    inputs |= {"encoder_hidden_states": randn(2, 7, 32), "pooled_projections": randn(2, 32)}
    return model, inputs | {"img_ids": randn(16, 3), "txt_ids": torch.zeros(7, 3)}


def uvit(preset):
    def make():
        model = create_uvit(preset, embed_dim=64, depth=2, num_heads=4)
        return model, dict(zip(("x", "timesteps", "y"), example_inputs(model, 2), strict=False))

    return make


MODELS = {
    "UViT": uvit("uvit-s/2"),
    "UViT class": uvit("uvit-l/2"),
    "UNet2DModel": unet,
    "UNet2DConditionModel": unet_condition,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
}


def first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", MODELS)
def test_sparse_equals_masked_dense_in_one_graph(name, masked_dense):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    for parameter in model.parameters():  # some models start with zeros, which would hide their layers
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    plan = sdm.sparsify(model, "2:4", policy="all")
    assert len(plan.patterns()) > len(plan) / 2
    reference = masked_dense(model)
    compiled = torch.compile(model, backend="sparsedm", fullgraph=True, options={"kernel": "cpu"})
    with torch.no_grad():
        want, got = first(reference(**inputs)), first(compiled(**inputs))
    assert torch.isfinite(want).all()
    assert (got - want).norm() <= 1e-5 * want.norm()

    report = sdm.explain(compiled, **inputs)
    assert report.graphs == 1
    assert [layer.name for layer in report.layers] == [layer.name for layer in plan]
    for layer in report.layers:
        assert layer.kernel in ("cpu", "dense")
        assert layer.pattern == str(plan[layer.name].pattern)
        assert layer.reason


def test_uvit_s2_whole(masked_dense):
    torch.manual_seed(0)
    model = create_uvit("uvit-s/2").eval()

    plan = sdm.sparsify(model, "2:4v2", policy="sparsedm")
    reference, inputs = masked_dense(model), example_inputs(model, 1)
    compiled = torch.compile(model, backend="sparsedm", fullgraph=True)
    with torch.no_grad():
        want, got = reference(*inputs), compiled(*inputs)
    assert (got - want).norm() <= 1e-5 * want.norm()
    report = sdm.explain(compiled, *inputs)
    assert [layer.name for layer in report.layers] == [layer.name for layer in plan]
    assert report.graphs == 1
