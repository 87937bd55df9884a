"""A sparse model in one file: weights with zeros where the masks drop them, and the plan."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsedm_compile.atomic_write import write_atomically
from sparsedm_compile.layers import sparse_layers
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.model_spec import check_state
from sparsedm_compile.packed_layers import packed_layers
from sparsedm_compile.plan import LayerInfo, Plan, PlanLayer
from sparsedm_compile.planning import make_plan, named_modules, unwrap
from sparsedm_compile.sparsify import check_shared, check_weight, get_plan, sparsify


def save_sparse(model: nn.Module, path: Path | str, *, freeze: bool = True) -> None:
    """Write a model to a safetensors file, with its plan in the metadata.

    The form is dense with zeros: names, shapes and dtypes are those of the dense model, so whatever loads that model
    loads this file, and computes with it what the sparse model computes. Packed weights are derived from it.

    Args:
        model: sparsified, or dense, which has an empty plan.
        path: replaced as a whole or not at all.
        freeze: write zero where a mask drops a weight. False keeps the dense weights, for a model that is to be
            trained on, or whose pattern is switched at run time; only :func:`load_sparse` masks them again.

    Raises:
        ValueError: the model is packed.
        OSError: the file cannot be written; what was there is intact.
    """
    model = unwrap(model)
    if packed_layers(model):
        raise ValueError("model is packed: its dense weights are gone; save the model before pack")
    layers = sparse_layers(model)
    plan = {layer.name: _planned(layer) for layer in get_plan(model)} if layers else {}
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if freeze:
        for key, weight, pattern in _masked(model):
            tensors[key] = mask_out(weight.detach(), pattern)
    # Copied: safetensors takes no two tensors that share memory, as tied weights do.
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"plan": json.dumps(plan), "frozen": json.dumps(freeze), "sha256": _digest(tensors)}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def load_sparse(model: nn.Module, path: Path | str) -> None:
    """Load a file of :func:`save_sparse` into a dense model of the same kind, and make it sparse by the file's plan.

    Args:
        model: dense, or sparsified with the plan of the file.
        path: a file of :func:`save_sparse`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, truncated or changed since; it is of another model, or the model is sparse by
            another plan; weights that :func:`sparsify` refuses.
        TypeError: the model's weights are not float32, bfloat16 or float16.
        In every case the model is left as it was.
    """
    model, path = unwrap(model), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from error
    if "plan" not in metadata:
        raise ValueError(f"{path} holds no plan: load its weights with load_state_dict, then call sparsify")
    if _digest(tensors) != metadata["sha256"]:
        raise ValueError(f"{path} is damaged: its tensors are not those that were saved; restore it from a copy")
    plan = json.loads(metadata["plan"])
    if sparse_layers(model):
        theirs = {name: layer["pattern"] for name, layer in plan.items()}
        ours = {layer.name: str(layer.pattern) for layer in get_plan(model)}
        different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{path} has another plan than the model: layer {name!r} is {theirs.get(name, 'unknown')} there and "
                f"{ours.get(name, 'unknown')} here ({len(different)} differ); load it into a dense model"
            )
        plan = {}
    policy, rules = _decisions(plan)
    check_state(model, tensors, path)
    if plan:
        _check_sparsify(model, make_plan(model, "dense", policy, rules), tensors)
    model.load_state_dict(tensors)
    if plan:
        sparsify(model, "dense", policy=policy, rules=rules)


def _check_sparsify(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Fail where :func:`sparsify` would once ``tensors`` are loaded, while nothing is changed."""
    modules = dict(named_modules(model))
    keys = {id(weight): key for key, weight in model.named_parameters(remove_duplicate=False)}
    for layer in plan:
        if layer.switchable:
            weight = modules[layer.name].weight
            check_weight(layer.name, tensors[keys[id(weight)]].to(weight))
    check_shared(model, plan)


def _planned(layer: PlanLayer) -> dict[str, str | bool]:
    return {"pattern": str(layer.pattern), "reason": layer.reason, "switchable": layer.switchable}


def _masked(model: nn.Module) -> list[tuple[str, Tensor, str]]:
    """State key, weight and pattern of each masked weight; a weight that several layers share has several keys."""
    patterns = {id(layer.weight): layer.pattern for layer in sparse_layers(model).values() if layer.pattern != "dense"}
    parameters = model.named_parameters(remove_duplicate=False)
    return [(name, weight, patterns[id(weight)]) for name, weight in parameters if id(weight) in patterns]


def _decisions(plan: Mapping[str, Mapping]) -> tuple[Callable[[LayerInfo], bool | str], dict[str, str]]:
    """The policy and the rules that make a model sparse by ``plan``."""

    def policy(layer: LayerInfo) -> bool | str:
        planned = plan.get(layer.name, {"switchable": False, "reason": "not in the plan of the checkpoint"})
        return planned["switchable"] or planned["reason"]

    return policy, {name: layer["pattern"] for name, layer in plan.items() if layer["pattern"] != "dense"}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())
