"""U-ViT against a float64 reference written from the paper, the published checkpoint layout, and its error messages."""

import pytest
import torch
from torch import Tensor

from sparsedm_compile.models import UViT, UViTText2Image, create_uvit, example_inputs, uvit_presets

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 4}


def tiny(preset: str, **overrides) -> UViT | UViTText2Image:
    torch.manual_seed(0)
    return create_uvit(preset, **TINY, **overrides).eval()


# --- the reference: state dict in, image out, in float64, one image at a time, no nn.Module -----------------------


def layer_norm(x: Tensor, state: dict, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict, name: str) -> Tensor:
    bias = state.get(f"{name}.bias")
    return torch.einsum("li,oi->lo", x, state[f"{name}.weight"]) + (0 if bias is None else bias)


def attention(x: Tensor, state: dict, name: str, heads: int) -> Tensor:
    query, key, value = linear(x, state, f"{name}.qkv").chunk(3, dim=1)
    width = x.shape[1] // heads
    out = torch.zeros_like(x)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = (query[:, part] @ key[:, part].T / width**0.5).softmax(1)
        out[:, part] = weights @ value[:, part]
    return linear(out, state, f"{name}.proj")


def block(x: Tensor, state: dict, name: str, heads: int, skip: Tensor | None = None) -> Tensor:
    if skip is not None:
        x = linear(torch.cat([x, skip], 1), state, f"{name}.skip_linear")
    x = x + attention(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn", heads)
    hidden = linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return x + linear(gelu, state, f"{name}.mlp.fc2")


def time_features(t: float, dim: int) -> Tensor:
    period = [10_000 ** (i / (dim // 2)) for i in range(dim // 2)]
    angles = torch.tensor([t / p for p in period], dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()])


def reference(model: UViT | UViTText2Image, x: Tensor, timesteps: Tensor, condition: Tensor | None = None) -> Tensor:
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    dim, depth, heads = TINY["embed_dim"], TINY["depth"], TINY["num_heads"]
    patch, channels, side = model.patch_size, model.in_chans, model.img_size // model.patch_size
    images = []
    for n in range(x.shape[0]):
        image = x[n].double()
        tokens = []
        for row in range(side):
            for column in range(side):
                cut = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                tokens.append((state["patch_embed.proj.weight"] * cut).sum((1, 2, 3)) + state["patch_embed.proj.bias"])
        time_token = time_features(timesteps[n].item(), dim).unsqueeze(0)
        if "time_embed.0.weight" in state:
            hidden = linear(time_token, state, "time_embed.0")
            time_token = linear(hidden * hidden.sigmoid(), state, "time_embed.2")
        prefix = [time_token]
        if isinstance(model, UViTText2Image):
            prefix.append(linear(condition[n].double(), state, "context_embed"))
        elif condition is not None:
            prefix.insert(0, state["label_emb.weight"][condition[n]].unsqueeze(0))
        h = torch.cat([*prefix, torch.stack(tokens)]) + state["pos_embed"][0]
        skips = []
        for i in range(depth // 2):
            h = block(h, state, f"in_blocks.{i}", heads)
            skips.append(h)
        h = block(h, state, "mid_block", heads)
        for i in range(depth // 2):
            h = block(h, state, f"out_blocks.{i}", heads, skips.pop())
        h = linear(layer_norm(h, state, "norm"), state, "decoder_pred")[-(side**2) :]
        out = torch.zeros_like(image)
        for token in range(side**2):
            row, column = divmod(token, side)
            cut = h[token].reshape(patch, patch, channels).permute(2, 0, 1)
            out[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = cut
        if "final_layer.weight" in state:
            out = torch.nn.functional.conv2d(
                out.unsqueeze(0), state["final_layer.weight"], state["final_layer.bias"], padding=1
            )[0]
        images.append(out)
    return torch.stack(images)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("uvit-s/2", {"img_size": 8}),
        ("uvit-s/2", {"img_size": 8, "mlp_time_embed": True, "qkv_bias": True}),
        ("uvit-m/4", {"img_size": 16}),
        ("uvit-h/2", {"img_size": 8}),
        ("uvit-t2i-s/2", {"img_size": 8, "clip_dim": 12, "num_clip_token": 5}),
    ],
)
def test_equals_the_float64_reference(preset, overrides):
    model = tiny(preset, **overrides)
    inputs = example_inputs(model, batch=2)
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases and unit norms would hide a mistake
            parameter.add_(0.1 * torch.randn_like(parameter))
        actual = model(*inputs)
    expected = reference(model, *inputs)
    assert (actual - expected).norm() / expected.norm() < 2e-6


# --- published checkpoints -----------------------------------------------------------------------------------------

BLOCK = {
    "norm1.weight": (32,),
    "norm1.bias": (32,),
    "attn.qkv.weight": (96, 32),
    "attn.proj.weight": (32, 32),
    "attn.proj.bias": (32,),
    "norm2.weight": (32,),
    "norm2.bias": (32,),
    "mlp.fc1.weight": (128, 32),
    "mlp.fc1.bias": (128,),
    "mlp.fc2.weight": (32, 128),
    "mlp.fc2.bias": (32,),
}
SKIP = {"skip_linear.weight": (32, 64), "skip_linear.bias": (32,)}


def checkpoint_shapes(tokens: int, channels: int, patch: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "pos_embed": (1, tokens, 32),
        "patch_embed.proj.weight": (32, channels, patch, patch),
        "patch_embed.proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "decoder_pred.weight": (channels * patch**2, 32),
        "decoder_pred.bias": (channels * patch**2,),
    }
    names = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    for name in names:
        layout = BLOCK | (SKIP if name.startswith("out") else {})
        shapes |= {f"{name}.{key}": shape for key, shape in layout.items()}
    return shapes


def final_conv(channels: int) -> dict[str, tuple[int, ...]]:
    return {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("uvit-s/2", checkpoint_shapes(257, 3, 2) | final_conv(3)),
        ("uvit-l/4", checkpoint_shapes(258, 3, 4) | final_conv(3) | {"label_emb.weight": (1000, 32)}),
        ("uvit-h/4", checkpoint_shapes(258, 4, 4) | {"label_emb.weight": (1001, 32)}),
        (
            "uvit-t2i-s/2",
            checkpoint_shapes(334, 4, 2)
            | final_conv(4)
            | {"context_embed.weight": (32, 768), "context_embed.bias": (32,)},
        ),
    ],
)
def test_state_dict_has_the_keys_and_shapes_of_the_published_checkpoints(preset, expected):
    assert {name: tuple(tensor.shape) for name, tensor in tiny(preset).state_dict().items()} == expected


def test_parameter_counts_are_those_of_the_paper():
    # The sizes that arXiv 2209.12152 prints, in millions.
    millions = {"uvit-s/2": 44, "uvit-m/4": 131, "uvit-l/4": 287, "uvit-l/2": 287, "uvit-h/2": 501, "uvit-t2i-s/2": 45}
    for preset, expected in millions.items():
        with torch.device("meta"):
            model = create_uvit(preset)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == expected, preset


def test_initialisation():
    model = create_uvit("uvit-s/2", depth=2)
    for name, parameter in model.named_parameters():
        if name == "pos_embed" or (parameter.dim() == 2 and name.endswith("weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif "patch_embed" not in name and "final_layer" not in name:
            assert (parameter == 0).all(), name


# --- behaviour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", uvit_presets())
def test_every_preset_runs_on_meta_with_its_example_inputs(preset):
    with torch.device("meta"):
        model = create_uvit(preset)
    inputs = example_inputs(preset, batch=2, device="meta")
    assert [t.device.type for t in inputs] == ["meta"] * len(inputs)
    assert model(*inputs).shape == inputs[0].shape


@pytest.mark.parametrize("preset", ["uvit-s/2", "uvit-m/4", "uvit-t2i-s/2"])
def test_compiles_as_one_graph_for_every_batch_size(preset):
    model = tiny(preset)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        inputs = example_inputs(model, batch)
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert len(graphs) == 1


def test_half_precision_without_autocast():
    model = tiny("uvit-m/4")
    inputs = example_inputs(model)
    with torch.no_grad():
        expected = model(*inputs)
        model.bfloat16()
        actual = model(*example_inputs(model))
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 0.05


def test_checkpointing_leaves_the_gradients_as_they_are():
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny("uvit-m/4", use_checkpoint=use_checkpoint)
        model(*example_inputs(model)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_example_inputs_are_reproducible_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = example_inputs("uvit-l/2", 3), example_inputs("uvit-l/2", 3)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    x, timesteps, labels = first
    assert x.shape == (3, 4, 32, 32)
    assert timesteps.shape == labels.shape == (3,)
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() < 1001


def test_presets_are_copies():
    uvit_presets()["uvit-s/2"]["embed_dim"] = 1
    assert uvit_presets()["uvit-s/2"]["embed_dim"] == 512


# --- errors --------------------------------------------------------------------------------------------------------


def test_unknown_preset_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown U-ViT preset 'uvit-xl/2'; valid are uvit-s/2, .*uvit-t2i-s/2"):
        create_uvit("uvit-xl/2")
    with pytest.raises(ValueError, match="unknown U-ViT preset"):
        example_inputs("uvit-xl/2")


def test_unknown_override_lists_the_valid_ones():
    with pytest.raises(TypeError, match="UViT takes no argument width; valid are img_size"):
        create_uvit("uvit-s/2", width=64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": 31}, "img_size 31 is not a multiple of patch_size 2"),
        ({"embed_dim": 100}, "embed_dim 100 must be even and a multiple of num_heads 8"),
        ({"depth": 3}, "depth 3 must be even"),
    ],
)
def test_sizes_that_do_not_divide(overrides, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_uvit("uvit-s/2", **overrides)


def test_inputs_that_do_not_fit():
    model = tiny("uvit-s/2")
    x, timesteps = example_inputs(model, 2)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 16, 32\), this U-ViT takes \(B, 3, 32, 32\)"):
        model(x[:, :, :16], timesteps)
    with pytest.raises(ValueError, match=r"timesteps has shape \(1,\), expected one per image: \(2,\)"):
        model(x, timesteps[:1])
    with pytest.raises(ValueError, match="num_classes=-1: leave y out"):
        model(x, timesteps, torch.zeros(2, dtype=torch.int64))
    conditional = tiny("uvit-m/4")
    with pytest.raises(ValueError, match=r"num_classes=1000: pass class labels y in \[0, 1000\)"):
        conditional(*example_inputs(conditional)[:2])
    text = tiny("uvit-t2i-s/2")
    x, timesteps, context = example_inputs(text)
    with pytest.raises(ValueError, match=r"context has shape \(1, 76, 768\), this U-ViT takes \(1, 77, 768\)"):
        text(x, timesteps, context[:, 1:])


def test_example_inputs_refuse_what_they_cannot_serve():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        example_inputs("uvit-s/2", batch=0)
    with pytest.raises(TypeError, match="takes a U-ViT or the name of a preset, got Linear"):
        example_inputs(torch.nn.Linear(1, 1))
