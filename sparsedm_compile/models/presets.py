"""The published U-ViT configurations by name, and inputs to call them with."""

import inspect
from typing import Any

import torch
from torch import Tensor

from sparsedm_compile.models.uvit import UViT, UViTText2Image

_SMALL = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_MIDDLE = {"embed_dim": 768, "depth": 16, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 20, "num_heads": 16}
_HUGE = {"embed_dim": 1152, "depth": 28, "num_heads": 16, "conv": False}
_PIXEL_64 = {"img_size": 64, "patch_size": 4, "in_chans": 3}
_LATENT_32 = {"img_size": 32, "patch_size": 2, "in_chans": 4}
_LATENT_64 = {"img_size": 64, "patch_size": 4, "in_chans": 4}
# The latent models were trained with classifier-free guidance: class 1000 stands for "no class".
_GUIDED = {"num_classes": 1001}

_PRESETS: dict[str, tuple[type[UViT | UViTText2Image], dict[str, Any]]] = {
    "uvit-s/2": (UViT, {"img_size": 32, "patch_size": 2, "in_chans": 3, **_SMALL}),  # CIFAR-10
    "uvit-s/4": (UViT, {**_PIXEL_64, **_SMALL}),  # CelebA 64x64
    "uvit-m/4": (UViT, {**_PIXEL_64, **_MIDDLE, "num_classes": 1000}),  # ImageNet 64x64
    "uvit-l/4": (UViT, {**_PIXEL_64, **_LARGE, "num_classes": 1000}),  # ImageNet 64x64
    "uvit-l/2": (UViT, {**_LATENT_32, **_LARGE, **_GUIDED}),  # ImageNet 256x256
    "uvit-h/2": (UViT, {**_LATENT_32, **_HUGE, **_GUIDED}),  # ImageNet 256x256
    "uvit-l/4-512": (UViT, {**_LATENT_64, **_LARGE, **_GUIDED}),  # ImageNet 512x512
    "uvit-h/4": (UViT, {**_LATENT_64, **_HUGE, **_GUIDED}),  # ImageNet 512x512
    "uvit-t2i-s/2": (UViTText2Image, {**_LATENT_32, **_SMALL, "clip_dim": 768, "num_clip_token": 77}),  # MSCOCO
}


def uvit_presets() -> dict[str, dict[str, Any]]:
    """Name -> constructor arguments of every published configuration (a copy)."""
    return {name: dict(config) for name, (_, config) in _PRESETS.items()}


def create_uvit(preset: str, **overrides: Any) -> UViT | UViTText2Image:
    """Build a U-ViT by name, with random weights; under ``torch.device("meta")`` without memory.

    Args:
        preset: one of :func:`uvit_presets`, such as ``"uvit-s/2"``.
        overrides: constructor arguments that replace the preset's, such as ``depth=4``.

    Raises:
        ValueError: unknown preset.
        TypeError: an override that the constructor does not take.
    """
    if preset not in _PRESETS:
        raise ValueError(f"unknown U-ViT preset {preset!r}; valid are {', '.join(_PRESETS)}")
    model_class, config = _PRESETS[preset]
    valid = inspect.signature(model_class).parameters
    unknown = [name for name in overrides if name not in valid]
    if unknown:
        raise TypeError(f"{model_class.__name__} takes no argument {', '.join(unknown)}; valid are {', '.join(valid)}")
    return model_class(**{**config, **overrides})


def example_inputs(
    model: str | UViT | UViTText2Image, batch: int = 1, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Inputs that ``model(*inputs)`` takes: reproducible noise, time steps in [0, 999) and a condition if it has one.

    Args:
        model: a U-ViT or the name of a preset.
        batch: number of images, at least 1.
        device: of the tensors; ``"meta"`` for shapes alone.

    Returns:
        ``(x, timesteps)``, ``(x, timesteps, y)`` or ``(x, timesteps, context)``; floats in the dtype of the model.

    Raises:
        ValueError: unknown preset, or ``batch < 1``.
        TypeError: neither a U-ViT nor a name.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if isinstance(model, str):
        with torch.device("meta"):
            model = create_uvit(model)
    if not isinstance(model, (UViT, UViTText2Image)):
        raise TypeError(f"example_inputs takes a U-ViT or the name of a preset, got {type(model).__name__}")
    generator = torch.Generator().manual_seed(0)
    dtype = model.pos_embed.dtype
    x = torch.randn(batch, model.in_chans, model.img_size, model.img_size, generator=generator, device="cpu")
    inputs = [x.to(dtype), 999 * torch.rand(batch, generator=generator, device="cpu")]
    if isinstance(model, UViTText2Image):
        context = torch.randn(batch, model.num_clip_token, model.clip_dim, generator=generator, device="cpu")
        inputs.append(context.to(dtype))
    elif model.num_classes > 0:
        inputs.append(torch.randint(model.num_classes, (batch,), generator=generator, device="cpu"))
    return tuple(tensor.to(device) for tensor in inputs)
