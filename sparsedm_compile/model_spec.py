"""Models by name: a preset, a diffusers class, or a factory of the user's; each with inputs to call it."""

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsedm_compile.models import UViT, UViTText2Image, create_uvit, example_inputs, uvit_presets

#: The demo's pretrained model, the only one whose weights are in the package.
DIGITS = "digits"
_HOW = (
    f"a preset ({', '.join((DIGITS, *uvit_presets()))}), 'diffusers:ClassName', or 'package.module:factory' for a "
    "function that returns a model or (model, inputs)"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and one call of it: ``model(*inputs, **kwargs)``."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_model(
    spec: str,
    *,
    batch: int | None = None,
    config: Path | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """Build the model that ``spec`` names, with inputs.

    Args:
        spec: a preset (``"uvit-s/2"``, ``"digits"``), ``"diffusers:UNet2DModel"``, or ``"package.module:factory"``: a
            callable without required arguments that returns a model or ``(model, inputs)``, where inputs are a tensor,
            a tuple or a dict of keyword arguments. A factory that takes ``batch`` is given it.
        batch: of the inputs, 1 unless given.
        config: JSON file with constructor arguments: all of a diffusers class's, or those that replace a preset's.
        checkpoint: weights, ``.safetensors`` or a state dict saved by torch; without it they are random (those of
            ``digits`` are in the package).
        device: ``"meta"`` builds the model without memory; a factory runs under ``torch.device("meta")`` then.

    Raises:
        ValueError: an unknown name, a config or checkpoint that does not fit, a factory that fails or returns
            something else, a class whose inputs are not known; the message says which and what to write.
        OSError: a file that cannot be read.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if checkpoint is not None and device == "meta":
        raise ValueError("a model on meta has no weights to load a checkpoint into")
    arguments = None if config is None else _read_config(config)
    source, colon, name = spec.partition(":")
    with torch.device(device):
        if not colon:
            loaded = _preset(spec, batch or 1, arguments, packaged=checkpoint is None and device != "meta")
        elif source == "diffusers":
            loaded = _diffusers(name, batch or 1, arguments)
        elif arguments is not None:
            raise ValueError("--config is for presets and diffusers classes; a factory builds its model itself")
        else:
            loaded = _factory(spec, source, name, batch, device)
    if checkpoint is not None:
        load_checkpoint(loaded.model, checkpoint)
    loaded.model.eval()
    return loaded


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load all weights of ``model`` from a file, in the dtype that the model has.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, or one of another model; the message names the first keys that do not fit.
    """
    from safetensors.torch import load_file

    if path.is_dir():
        raise IsADirectoryError(f"checkpoint {path} is a folder: name the file of weights in it")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling a file that is no checkpoint raises what it likes
        raise ValueError(f"{path} is not a checkpoint that can be read: {_one_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, not a state dict (name -> tensor)")
    load_state(model, state, path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """``model.load_state_dict``, with the errors of :func:`load_checkpoint` and before anything is loaded."""
    check_state(model, state, path)
    model.load_state_dict(state)


def check_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a state dict, read from ``path``, that lacks keys of ``model``, has others, or tensors of other shapes."""
    wanted = model.state_dict()
    for problem, keys in (("lacks", wanted.keys() - state.keys()), ("has unknown", state.keys() - wanted.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise ValueError(f"{path} {problem} {len(keys)} of the keys of {type(model).__name__}: {shown}, ...")
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"{path}: {key!r} has shape {tuple(state[key].shape)}, the model has {tuple(tensor.shape)}; "
                "choose the model that the checkpoint was made from"
            )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"config {path} does not exist") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"config {path} is a folder: name the JSON file in it") from None
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"config {path} must hold a JSON object with constructor arguments, not {type(config).__name__}"
        )
    return config


def _preset(name: str, batch: int, overrides: dict[str, Any] | None, packaged: bool) -> LoadedModel:
    if name == DIGITS:
        from sparsedm_compile.demo import digits

        if overrides:
            raise ValueError("--config does not go with 'digits', whose weights are fixed")
        model = digits.load_model() if packaged else digits.create_model()
    elif name in uvit_presets():
        try:
            model = create_uvit(name, **(overrides or {}))
        except TypeError as error:
            raise ValueError(f"config for {name}: {error}") from error
    else:
        close = difflib.get_close_matches(name, (DIGITS, *uvit_presets()), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown model {name!r}{hint}: name {_HOW}")
    return LoadedModel(name, model, _inputs_on_cpu(model, batch))


def _inputs_on_cpu(model: UViT | UViTText2Image, batch: int) -> tuple[Tensor, ...]:
    with torch.device("cpu"):
        return example_inputs(model, batch)


def _diffusers(name: str, batch: int, config: dict[str, Any] | None) -> LoadedModel:
    from sparsedm_compile import diffusers_models

    model = diffusers_models.create(name, config)
    with torch.device("cpu"):
        kwargs = diffusers_models.example_inputs(model, batch)
    return LoadedModel(f"diffusers:{name}", model, (), kwargs)


def _factory(spec: str, module: str, name: str, batch: int | None, device: str) -> LoadedModel:
    try:
        factory: Callable = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"model {spec!r}: {error}; name {_HOW}") from error
    except AttributeError as error:
        raise ValueError(f"model {spec!r}: module {module!r} has no {name!r}") from error
    if not callable(factory):
        raise ValueError(f"model {spec!r}: {name!r} is {type(factory).__name__}, not a function that makes a model")
    takes_batch = "batch" in inspect.signature(factory).parameters
    try:
        made = factory(**({"batch": batch or 1} if takes_batch else {}))
    except Exception as error:
        on_meta = " It ran under torch.device('meta'); wrap what needs values in torch.device('cpu')."
        raise ValueError(
            f"model {spec!r}: the factory raised {type(error).__name__}: {_one_line(error)}."
            + (on_meta if device == "meta" else "")
        ) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r}: the factory returned {type(model).__name__}, not a model or (model, inputs)")
    if inputs is None:
        return LoadedModel(spec, model, *_known_inputs(spec, model, batch or 1))
    if batch is not None and not takes_batch:
        raise ValueError(f"model {spec!r}: the factory makes the inputs but takes no 'batch', so none can be chosen")
    if isinstance(inputs, Mapping):
        return LoadedModel(spec, model, (), dict(inputs))
    return LoadedModel(spec, model, (inputs,) if isinstance(inputs, Tensor) else tuple(inputs))


def _known_inputs(spec: str, model: nn.Module, batch: int) -> tuple[tuple, dict]:
    if isinstance(model, UViT | UViTText2Image):
        return _inputs_on_cpu(model, batch), {}
    if type(model).__module__.startswith("diffusers."):
        from sparsedm_compile import diffusers_models

        with torch.device("cpu"):
            return (), diffusers_models.example_inputs(model, batch)
    raise ValueError(
        f"model {spec!r}: inputs of {type(model).__name__} are not known; let the factory return (model, inputs)"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
