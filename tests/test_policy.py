"""Policies: the paper's layers of U-ViT, a sensible default for any diffusion model, and callables."""

import diffusers
import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.models import UViT, UViTText2Image, create_uvit

PAPER = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def on_meta(factory, *args, **kwargs):
    with torch.device("meta"):
        return factory(*args, **kwargs)


@pytest.fixture(scope="module")
def uvit():
    return on_meta(create_uvit, "uvit-s/2")


def blocks(depth=12):
    half = depth // 2
    return [*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))]


def test_sparsedm_is_the_four_linears_of_the_paper(uvit):
    plan = sdm.make_plan(uvit, "2:4", policy="sparsedm")
    assert set(plan.patterns()) == {f"{block}.{layer}" for block in blocks() for layer in PAPER}
    assert plan["out_blocks.0.skip_linear"].reason == "policy sparsedm: the paper leaves it dense"


def test_with_skip(uvit):
    plan = sdm.make_plan(uvit, "2:4", policy="sparsedm+skip")
    skips = {f"out_blocks.{i}.skip_linear" for i in range(6)}
    assert set(plan.patterns()) == {f"{block}.{layer}" for block in blocks() for layer in PAPER} | skips


def test_sparsedm_on_one_block_of_uvit(uvit):
    assert set(sdm.make_plan(uvit.mid_block, "2:4", policy="sparsedm").patterns()) == set(PAPER)


def test_default_on_uvit(uvit):
    plan = sdm.make_plan(uvit, "2:4")
    assert set(plan.patterns()) == set(sdm.make_plan(uvit, "2:4", policy="sparsedm+skip").patterns())
    assert "embedding" in plan["patch_embed.proj"].reason
    assert "first or last" in plan["decoder_pred"].reason or "tiny" in plan["decoder_pred"].reason
    assert "tiny" in plan["final_layer"].reason


def test_all_leaves_dense_only_what_cannot(uvit):
    plan = sdm.make_plan(uvit, "2:4", policy="all")
    assert {layer.name for layer in plan if layer.pattern.is_dense} == {"patch_embed.proj", "final_layer"}


def test_the_papers_policy_says_what_it_leaves_of_another_model(caplog):
    class Block(nn.Module):  # of DiT's own code: U-ViT's names, and one more
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.qkv, self.attn.proj = nn.Linear(64, 192), nn.Linear(64, 64)
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(64, 384))

    plan = sdm.make_plan(nn.ModuleDict({"block": Block()}), policy="sparsedm")
    assert len(plan.patterns()) == 4
    assert (
        "policy 'sparsedm' is for U-ViT: it leaves 1 of 5 layers of this model dense, and U-ViT has no "
        "'block.adaLN_modulation.1'; policy='default' takes" in caplog.text
    )


def test_no_word_of_it_for_any_uvit(caplog):
    for kind in (UViT(8, 2, 3, 32, 2, 2, num_classes=4, mlp_time_embed=True), UViTText2Image(8, 2, 3, 32, 2, 2)):
        sdm.make_plan(kind, policy="sparsedm")
    assert not caplog.text


@pytest.mark.parametrize("policy", ["sparsedm", "sparsedm+skip"])
def test_the_papers_policy_is_refused_where_it_finds_nothing(policy):
    unet = on_meta(diffusers.UNet2DModel, block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
                   up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(ValueError, match="is for U-ViT and found none of its layers"):
        sdm.make_plan(unet, "2:4", policy=policy)


# Model -> layers that must stay dense, layers that must not.
DIFFUSERS = {
    "UNet2DModel": (
        lambda: diffusers.UNet2DModel(block_out_channels=(64, 128), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                      up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        ("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"),
        ("down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.to_q", "up_blocks.0.resnets.0.conv_shortcut",
         "down_blocks.0.downsamplers.0.conv", "mid_block.resnets.0.conv2"),
    ),
    "DiTTransformer2DModel": (
        lambda: diffusers.DiTTransformer2DModel(num_attention_heads=4, attention_head_dim=16, num_layers=3),
        ("pos_embed.proj", "proj_out_1", "proj_out_2", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"),
        ("transformer_blocks.0.attn1.to_q", "transformer_blocks.2.ff.net.0.proj", "transformer_blocks.1.norm1.linear"),
    ),
    "SD3Transformer2DModel": (
        lambda: diffusers.SD3Transformer2DModel(num_layers=3, attention_head_dim=16, num_attention_heads=4,
                                                joint_attention_dim=64, caption_projection_dim=64,
                                                pooled_projection_dim=64),
        ("pos_embed.proj", "context_embedder", "time_text_embed.text_embedder.linear_1", "proj_out"),
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1.ff.net.2"),
    ),
    "FluxTransformer2DModel": (
        lambda: diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=2, attention_head_dim=16,
                                                 num_attention_heads=4, joint_attention_dim=64,
                                                 pooled_projection_dim=64, axes_dims_rope=(4, 6, 6)),
        ("x_embedder", "context_embedder", "proj_out", "time_text_embed.timestep_embedder.linear_1"),
        ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp",
         "transformer_blocks.0.ff.net.0.proj"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS)
def test_default_on_diffusers_models(name):
    factory, dense, sparse = DIFFUSERS[name]
    plan = sdm.make_plan(on_meta(factory), "2:4")
    for layer in dense:
        assert plan[layer].pattern.is_dense, layer
        assert plan[layer].reason.startswith("policy default"), plan[layer].reason
    for layer in sparse:
        assert not plan[layer].pattern.is_dense, plan[layer].reason


def test_default_keeps_the_layers_of_a_block_compiled_alone():
    block = on_meta(torch.nn.TransformerEncoderLayer, 64, 4)
    assert set(sdm.make_plan(block, "2:4").patterns()) == {"linear1", "linear2"}


def test_tiny_layers_stay_dense():
    model = on_meta(torch.nn.Sequential, torch.nn.Linear(64, 16), torch.nn.Linear(16, 64), torch.nn.Linear(32, 32))
    plan = sdm.make_plan(model, "2:4")
    assert set(plan.patterns()) == {"2"}
    assert "fewer than 32" in plan["0"].reason


def test_a_callable_decides_and_gives_reasons(uvit):
    def policy(layer):
        if layer.kind != "linear":
            return False
        return True if layer.weight_shape[0] == 2048 else "only wide layers"

    plan = sdm.make_plan(uvit, "1:4", policy=policy)
    assert set(plan.patterns()) == {f"{block}.mlp.fc1" for block in blocks()}
    assert plan["mid_block.attn.qkv"].reason == "only wide layers"
    assert plan["final_layer"].reason == "policy: left dense"


@pytest.mark.parametrize("answer", [None, 1, b"2:4"])
def test_a_callable_must_answer(uvit, answer):
    with pytest.raises(TypeError, match="expected True, False or a reason"):
        sdm.make_plan(uvit, "2:4", policy=lambda layer: answer)


def test_errors_of_a_callable_pass_through(uvit):
    with pytest.raises(ZeroDivisionError):
        sdm.make_plan(uvit, "2:4", policy=lambda layer: 1 / 0)
