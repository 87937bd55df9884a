"""Models by name: the right architecture, inputs that it takes, and factories of the user's."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsedm_compile.macs import count_macs
from sparsedm_compile.model_spec import load_checkpoint, load_model
from sparsedm_compile.models import UViT, create_uvit, uvit_presets

# Parameters of the published checkpoints, and the parts of their config.json that differ from the class's defaults.
PUBLISHED = {
    "ddpm-cifar10-32": (
        "UNet2DModel",
        35_746_307,
        {
            "sample_size": 32,
            "block_out_channels": [128, 256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
    ),
    "stable-diffusion-1.5": ("UNet2DConditionModel", 859_520_964, {"sample_size": 64, "cross_attention_dim": 768}),
    "sdxl": (
        "UNet2DConditionModel",
        2_567_463_684,
        {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_diffusers_models_are_built_and_called(tmp_path, name):
    pytest.importorskip("diffusers")
    class_name, params, config = PUBLISHED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": class_name, **config}))
    loaded = load_model(f"diffusers:{class_name}", config=path, batch=2, device="meta")
    assert sum(p.numel() for p in loaded.model.parameters()) == params
    assert loaded.kwargs["sample"].shape[0] == 2
    assert count_macs(loaded.model, *loaded.inputs, **loaded.kwargs).dense > 0


@pytest.mark.parametrize(
    "class_name",
    ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"],
)
def test_transformers_take_their_inputs(class_name):
    pytest.importorskip("diffusers")
    one, two = (load_model(f"diffusers:{class_name}", batch=batch, device="meta") for batch in (1, 2))
    assert all(parameter.is_meta for parameter in one.model.parameters())
    counted = [count_macs(loaded.model, *loaded.inputs, **loaded.kwargs) for loaded in (one, two)]
    assert counted[1].attention == 2 * counted[0].attention > 0


@pytest.mark.parametrize("name", uvit_presets())
def test_presets_take_their_inputs(name):
    loaded = load_model(name, batch=2, device="meta")
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert loaded.model(*(tensor.to("meta") for tensor in loaded.inputs)).shape == loaded.inputs[0].shape


def test_digits_come_with_their_weights():
    weights = [load_model("digits").model.state_dict()["pos_embed"] for _ in range(2)]
    assert torch.equal(*weights)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """Write a module of factories; returns the spec of one of them."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "factories_for_test", raising=False)

    def write(source):
        (tmp_path / "factories_for_test.py").write_text(f"import torch\nfrom torch import nn\n{source}\n")
        return "factories_for_test:make"

    return write


@pytest.mark.parametrize(
    ("returns", "inputs", "kwargs"),
    [
        ("nn.Linear(4, 2), torch.zeros(3, 4)", 1, []),
        ("nn.Bilinear(4, 4, 2), (torch.zeros(3, 4), torch.zeros(3, 4))", 2, []),
        ("nn.Linear(4, 2), {'input': torch.zeros(3, 4)}", 0, ["input"]),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_factories_may_return_inputs(factory, returns, inputs, kwargs):
    loaded = load_model(factory(f"def make():\n    return {returns}"))
    assert (len(loaded.inputs), list(loaded.kwargs)) == (inputs, kwargs)
    assert loaded.model(*loaded.inputs, **loaded.kwargs).shape == (3, 2)
    assert not loaded.model.training


def test_a_factory_of_a_known_model_needs_no_inputs(factory):
    spec = factory(
        "def make():\n    from sparsedm_compile.models import create_uvit\n    return create_uvit('uvit-s/2', depth=2)"
    )
    loaded = load_model(spec, batch=3)
    assert isinstance(loaded.model, UViT)
    assert loaded.inputs[0].shape == (3, 3, 32, 32)


def test_a_factory_runs_on_meta_when_asked_to(factory):
    loaded = load_model(
        factory("def make():\n    return nn.Linear(10**6, 10**6), torch.zeros(1, 10**6)"), device="meta"
    )
    assert loaded.model.weight.is_meta


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("def make():\n    return nn.Linear(4, 2)", {}, "let the factory return"),
        ("def make():\n    return nn.Linear(4, 2), torch.zeros(1, 4)", {"batch": 2}, "takes no 'batch'"),
        (
            "def make():\n    return torch.zeros(2).tolist()",
            {"device": "meta"},
            r"wrap what needs values in torch.device\('cpu'\)",
        ),
        ("make = 3", {}, "not a function"),
        ("import not_there_at_all", {}, "No module named 'not_there_at_all'"),
    ],
    ids=["no inputs", "no batch", "values on meta", "no function", "import inside"],
)
def test_factories_that_do_not_do(factory, source, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_model(factory(source), **arguments)


def test_checkpoints_of_both_kinds_load(tmp_path):
    config = {"img_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    saved, loaded = create_uvit("uvit-s/2", **config), create_uvit("uvit-s/2", **config)
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        nn.init.zeros_(loaded.pos_embed)
        load_checkpoint(loaded, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))


def test_a_checkpoint_cannot_go_to_meta(tmp_path):
    with pytest.raises(ValueError, match="on meta"):
        load_model("uvit-s/2", checkpoint=tmp_path / "weights.pth", device="meta")
