"""Whole models: outputs unchanged, more kept, and what the model computes with its masks nearer to dense."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compile as sdm
from sparsedm_compile.demo.digits import load_digits, load_model
from sparsedm_compile.models import UViT
from sparsedm_compile.permutation import permute_channels


def call(model, inputs, kwargs) -> Tensor:
    with torch.no_grad():
        result = model(*inputs, **kwargs)
    return result if isinstance(result, Tensor) else result.sample


def uneven(model: nn.Module) -> nn.Module:
    """Random weights are alike, and then no order is better than another. Here inputs fade, neighbours being alike,
    and each output prefers some of them.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                outputs, inputs = parameter.shape[:2]
                fade = torch.linspace(1, -1, inputs).exp().reshape(1, -1)
                taste = torch.randn(outputs, 2, generator=generator) @ torch.randn(2, inputs, generator=generator)
                scale = fade * (0.5 * taste).exp()
                parameter.mul_(scale.reshape(outputs, inputs, *[1] * (parameter.dim() - 2)))
    return model.eval()


def tiny_uvit():
    model = UViT(img_size=8, patch_size=2, in_chans=3, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    return model, (torch.randn(16, 3, 8, 8), torch.rand(16) * 999, torch.arange(16) % 10), {}


def tiny_dit():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=8,
    )  # fmt: skip
    times, labels = torch.arange(16) * 60, torch.arange(16) % 10
    return model, (torch.randn(16, 4, 8, 8),), {"timestep": times, "class_labels": labels}


def tiny_unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 32),
        norm_num_groups=4, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, (torch.randn(8, 3, 8, 8), torch.arange(8) * 100), {}


MODELS = {"uvit": tiny_uvit, "dit": tiny_dit, "unet": tiny_unet}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, inputs, kwargs = MODELS[request.param]()
    return request.param, uneven(model), inputs, kwargs


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
def test_the_function_stays_and_one_shot_pruning_costs_less(case, pattern):
    _name, model, inputs, kwargs = case
    dense = call(model, inputs, kwargs)

    def pruned_error() -> float:
        sparse = copy.deepcopy(model)
        sdm.sparsify(sparse, pattern)
        return ((call(sparse, inputs, kwargs) - dense).norm() / dense.norm()).item()

    error, names = pruned_error(), list(model.state_dict())
    report = permute_channels(model, *inputs, pattern=pattern, **kwargs)
    assert (call(model, inputs, kwargs) - dense).abs().max() <= 1e-5 * dense.abs().max()
    assert report.kept_after > report.kept_before
    assert pruned_error() < error
    assert list(model.state_dict()) == names


#: An axis of each model that cannot move, and why.
PINNED = {
    "uvit": ("pos_embed[2]", "computed by arange"),  # the sinusoid enters the residual stream as a token
    "dit": ("pos_embed.proj.weight[0]", "pos_embed.pos_embed is a buffer that checkpoints do not hold"),
    "unet": ("time_embedding.linear_1.weight[1]", "computed by arange"),
}


def test_all_the_freedom_found_is_exact(case, shuffled, freedom):
    name, model, inputs, kwargs = case
    solution, moved, difference = shuffled(model, *inputs, **kwargs)
    assert moved > 0
    assert difference < 1e-6  # they compute parts in float32 whatever their weights are
    axis, words = PINNED[name]
    _channels, free, reasons = freedom(solution, axis)
    assert free == 0
    assert words in reasons


def denoising_loss(model, images) -> float:
    """At the same times and noise each time."""
    generator, process = torch.Generator().manual_seed(0), sdm.VPSDE()
    times = process.sample_times(len(images), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        predicted = process.predict_noise(model, process.perturb(images, times, noise), times)
    return (predicted - noise).square().mean().item()


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
def test_the_trained_digits_model_loses_less(pattern):
    model, images = load_model(), load_digits()[1][:100]
    rules = {"mid_block.*": pattern}  # one block is enough to tell, and quick to search

    def losses() -> tuple[float, float]:
        sparse = copy.deepcopy(model)
        sdm.sparsify(sparse, "dense", rules=rules)
        return denoising_loss(model, images), denoising_loss(sparse, images)

    dense, pruned = losses()
    report = permute_channels(model, images[:8], torch.rand(8) * 999, pattern="dense", rules=rules)
    dense_after, pruned_after = losses()
    assert dense_after == pytest.approx(dense, rel=1e-5)
    assert report.kept_after > report.kept_before
    assert pruned_after < pruned
