"""Diffusers models by class name and config, and random inputs of the shapes that their pipelines give them."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Where a config leaves the size of the image or latent open.
_SIZE = 64
# Tokens of a prompt: CLIP's limit, and T5's in the pipelines of SD3 and Flux.
_CLIP_TOKENS, _T5_TOKENS = 77, 256


def create(name: str, config: dict[str, Any] | None = None) -> nn.Module:
    """Build a diffusers model with random weights.

    Args:
        name: of the class, such as ``"UNet2DModel"``.
        config: as in the ``config.json`` beside a published checkpoint; the defaults of the class where it is silent.

    Raises:
        ValueError: diffusers is not installed, the name is unknown or no model's, or the config holds an unknown key or
            does not fit.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"'diffusers:{name}' needs diffusers: pip install 'sparsedm-compile[diffusers]'") from error
    model_class = getattr(diffusers, name, None)
    if model_class is None:
        close = difflib.get_close_matches(name, [known for known in dir(diffusers) if known[:1].isupper()], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"inputs are known for {', '.join(_INPUTS)}"
        raise ValueError(f"diffusers has no class {name!r}; {hint}")
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise ValueError(f"diffusers' {name!r} is no model; inputs are known for {', '.join(_INPUTS)}")
    if config is not None and config.get("_class_name", name) != name:
        raise ValueError(f"the config is for {config['_class_name']}, not for {name}")
    # from_config itself passes over a key that the class does not know. Those with an underscore say where it is from.
    valid = [argument for argument in inspect.signature(model_class.__init__).parameters if argument != "self"]
    unknown = [key for key in config or {} if key not in valid and not key.startswith("_")]
    if unknown:
        raise ValueError(
            f"the config holds what diffusers' {name} does not take: {', '.join(unknown)}; valid are {', '.join(valid)}"
        )
    try:
        return model_class.from_config(config or {})
    except Exception as error:  # constructors raise what they like on sizes that do not divide
        raise ValueError(f"diffusers:{name} cannot be built from this config: {error}") from error


def example_inputs(model: nn.Module, batch: int = 1) -> dict[str, Any]:
    """Keyword arguments of one call of ``model``: noise, mid-way time steps and random conditions.

    Raises:
        ValueError: the class is not one of those whose inputs are known.
    """
    name = type(model).__name__
    if name not in _INPUTS:
        raise ValueError(
            f"inputs of diffusers' {name} are not known (known: {', '.join(_INPUTS)}); "
            "write a factory that returns (model, inputs) and name it 'package.module:factory'"
        )
    return {**_INPUTS[name](model.config, batch), "return_dict": False}


def _image(config: Any, batch: int) -> Tensor:
    size = config.sample_size or _SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, config.in_channels, height, width)


def _time(batch: int) -> Tensor:
    return torch.full((batch,), 500.0)


def _unet(config: Any, batch: int) -> dict[str, Any]:
    inputs = {"sample": _image(config, batch), "timestep": _time(batch)}
    if config.class_embed_type is not None and config.class_embed_type != "timestep":
        raise ValueError(f"class_embed_type {config.class_embed_type!r}: write a factory that returns (model, inputs)")
    if config.num_class_embeds is not None:
        inputs["class_labels"] = torch.randint(config.num_class_embeds, (batch,))
    elif config.class_embed_type == "timestep":
        inputs["class_labels"] = _time(batch)
    return inputs


def _unet_condition(config: Any, batch: int) -> dict[str, Any]:
    width = config.cross_attention_dim
    inputs = _unet(config, batch)
    inputs["encoder_hidden_states"] = torch.randn(batch, _CLIP_TOKENS, width if isinstance(width, int) else width[0])
    if config.addition_embed_type == "text_time":  # SDXL: a pooled prompt, and six sizes and positions
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, text), "time_ids": torch.ones(batch, 6)}
    elif config.addition_embed_type is not None:
        raise ValueError(
            f"addition_embed_type {config.addition_embed_type!r}: write a factory that returns (model, inputs)"
        )
    return inputs


def _dit(config: Any, batch: int) -> dict[str, Any]:
    labels = torch.randint(config.num_embeds_ada_norm, (batch,))
    return {"hidden_states": _image(config, batch), "timestep": _time(batch).long(), "class_labels": labels}


def _pixart(config: Any, batch: int) -> dict[str, Any]:
    inputs = {
        "hidden_states": _image(config, batch),
        "timestep": _time(batch),
        "encoder_hidden_states": torch.randn(batch, 120, config.caption_channels or config.cross_attention_dim),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    if config.use_additional_conditions or (config.use_additional_conditions is None and config.sample_size == 128):
        inputs["added_cond_kwargs"] = {
            "resolution": torch.full((batch, 2), 1024.0),
            "aspect_ratio": torch.ones(batch, 1),
        }
    return inputs


def _sd3(config: Any, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _image(config, batch),
        "timestep": _time(batch),
        "encoder_hidden_states": torch.randn(batch, _CLIP_TOKENS + _T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
    }


def _flux(config: Any, batch: int) -> dict[str, Any]:
    side = _SIZE  # 1024 x 1024 pixels: 128 x 128 latents, packed 2 x 2
    image_ids = torch.zeros(side, side, 3)
    image_ids[..., 1] += torch.arange(side)[:, None]
    image_ids[..., 2] += torch.arange(side)[None, :]
    inputs = {
        "hidden_states": torch.randn(batch, side * side, config.in_channels),
        "timestep": _time(batch) / 1000,
        "encoder_hidden_states": torch.randn(batch, 2 * _T5_TOKENS, config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "img_ids": image_ids.reshape(-1, 3),
        "txt_ids": torch.zeros(2 * _T5_TOKENS, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5)
    return inputs


_INPUTS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
