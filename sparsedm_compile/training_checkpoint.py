"""Saving a training run so that it can be killed at any moment, and going on from there bit for bit."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsedm_compile.atomic_write import write_atomically

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


class TrainingCheckpoints:
    """The newest state of a training run, in a directory of its own.

    ``step-00000100.safetensors`` holds the tensors, and in its metadata everything else: the plan among the settings,
    counters, the optimizer's numbers. ``manifest.json`` names that file with its size and SHA-256, and is replaced only
    once the file is on the disk; files that it does not name are removed after that. So a kill, or a full disk, leaves
    the checkpoint of before.

    Args:
        directory: made if it is missing.
        parts: name -> what the state consists of: objects with ``state_dict`` and ``load_state_dict``, or torch
            Generators; ``"model"`` among them. They are restored in this order.
        settings: what a run must share with the one that it goes on with; JSON values. ``settings["plan"]`` is the
            pattern of each layer.
    """

    def __init__(self, directory: Path | str, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.step: int | None = None
        self._parts = parts
        self._settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be when read

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps.

        Raises:
            OSError: it could not be written; the checkpoint before is intact.
        """
        tensors: dict[str, Tensor] = {}
        tree = {name: _split(_state_of(part), name, tensors) for name, part in self._parts.items()}
        metadata = {"settings": json.dumps(self._settings), "tree": json.dumps(tree), "step": str(step)}
        path = self.directory / f"step-{step:08d}.safetensors"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
            manifest = {"step": step, "file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
            text = json.dumps(manifest, indent=2) + "\n"
            write_atomically(self.directory / _MANIFEST, lambda temporary: temporary.write_text(text))
        except OSError as error:
            kept = "there is none before it" if self.step is None else f"that of step {self.step} is intact"
            raise OSError(f"the checkpoint of step {step} could not be saved; {kept}: {error}") from error
        self.step = step
        for other in (*self.directory.glob("step-*.safetensors"), *self.directory.glob(".step-*.partial")):
            if other != path:
                other.unlink()

    def restore(self) -> bool:
        """Bring the parts into the saved state, if there is one.

        Returns:
            Whether there was one.

        Raises:
            ValueError: the checkpoint is damaged, or one of another model, plan or other settings. The parts are as
                they were.
        """
        path = self._verified()
        if path is None:
            return False
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        difference = _difference(json.loads(metadata["settings"]), self._settings)
        if difference is not None:
            name, theirs, ours = difference
            raise ValueError(
                f"{self.directory} holds a run with {name} = {theirs}, and this one has {ours}: go on as that run "
                "began, or choose another directory"
            )
        states = {name: _join(node, tensors) for name, node in json.loads(metadata["tree"]).items()}
        self._check_parts(states)
        for name, part in self._parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(states[name])
            else:
                part.load_state_dict(states[name])
        self.step = int(metadata["step"])
        logger.info("going on from step %d of %s", self.step, self.directory)
        return True

    def _verified(self) -> Path | None:
        manifest_path = self.directory / _MANIFEST
        if not manifest_path.exists():
            return None
        remedy = "restore it from a copy, or remove the directory to start from the beginning"
        try:
            manifest = json.loads(manifest_path.read_text())
            path, size, digest = self.directory / manifest["file"], manifest["bytes"], manifest["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest_path} is damaged ({error!r}): {remedy}") from error
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {_MANIFEST} names it: {remedy}")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is truncated: {path.stat().st_size} bytes of {size}; {remedy}")
        if _sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of {_MANIFEST}; {remedy}")
        return path

    def _check_parts(self, states: Mapping[str, Any]) -> None:
        if states.keys() != self._parts.keys():
            raise ValueError(
                f"{self.directory} holds a run with the parts {', '.join(states)}, and this one has "
                f"{', '.join(self._parts)}: go on as that run began, or choose another directory"
            )
        ours, theirs = self._parts["model"].state_dict(), states["model"]
        for name in sorted(ours.keys() | theirs.keys()):
            there, here = (tuple(state[name].shape) if name in state else "no shape" for state in (theirs, ours))
            if there != here:
                raise ValueError(
                    f"{self.directory} holds a run of another model: {name!r} has {there} there and {here} here"
                )


def _state_of(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors`` and named by their path. Dict keys keep their type."""
    if isinstance(value, Tensor):
        # Copied: safetensors takes no two tensors that share memory, as tied weights do.
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _join(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in content}
    if kind == "list":
        return [_join(item, tensors) for item in content]
    return content


def _difference(theirs: Any, ours: Any, path: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            found = _difference(theirs.get(key), ours.get(key), f"{path}[{key!r}]" if path else key)
            if found is not None:
                return found
        return None
    return None if theirs == ours else (path, theirs, ours)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RandomState:
    """The states of torch's default generators: the CPU's, and that of ``device`` if it is a CUDA one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Tensor]:
        """Generator states, uint8."""
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set them; a state of a device that this run does not use is left out."""
        torch.set_rng_state(state["cpu"])
        if self._device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self._device)
