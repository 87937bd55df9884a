"""Saving a training run so that it can be killed at any moment, and going on from there bit for bit."""

import copy
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sparsedm_compile.atomic_write import write_atomically
from sparsedm_compile.data_position import RepeatedBatches
from sparsedm_compile.distributed import of_all_processes, on_first_process, rank_and_world
from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.tensor_files import read_metadata, read_tensors, write_tensors

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


class TrainingCheckpoints:
    """The newest state of a training run, in a directory of its own.

    ``step-00000100.safetensors`` holds the tensors, and in its metadata everything else: the plan among the settings,
    counters, the optimizer's numbers. Where tensors are spread over processes (FSDP2), ``step-00000100`` is a folder
    that torch.distributed.checkpoint wrote, each process its part, with everything else in ``metadata.json``. Either
    can be read by any number of processes, and by a model spread in another way, or not at all.

    ``manifest.json`` names the files with their sizes and SHA-256, and is replaced only once they are on the disk; what
    it does not name is removed after that. So a kill, or a full disk, leaves the checkpoint of before.

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

    def check_writable(self) -> None:
        """Find out before any work, rather than at the first :meth:`save`, that nothing can be saved.

        Raises:
            OSError: the directory cannot be made, or no file in it; a checkpoint in it is intact.
        """
        try:
            on_first_process(self._write_nothing)
        except OSError as error:
            reason = "it is a file" if self.directory.is_file() else error
            raise OSError(
                f"checkpoints cannot be saved in {self.directory}: {reason}; choose another directory, or make this "
                "one writable"
            ) from error

    def _write_nothing(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            pass

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps.

        Raises:
            OSError: it could not be written; the checkpoint before is intact.
        """
        tensors: dict[str, Tensor] = {}
        tree = {name: _split(_state_of(part), name, tensors) for name, part in self._parts.items()}
        metadata = {"settings": json.dumps(self._settings), "tree": json.dumps(tree), "step": str(step)}
        path = self.directory / f"step-{step:08d}"
        try:
            on_first_process(lambda: self.directory.mkdir(parents=True, exist_ok=True))
            written = write_tensors(path, tensors, metadata)
            on_first_process(lambda: self._name(step, written))
        except OSError as error:
            kept = "there is none before it" if self.step is None else f"that of step {self.step} is intact"
            raise OSError(f"the checkpoint of step {step} could not be saved; {kept}: {error}") from error
        self.step = step

    def _name(self, step: int, path: Path) -> None:
        """Make ``path`` the checkpoint, and remove all others."""
        files = {
            file.relative_to(self.directory).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        }
        text = json.dumps({"step": step, "checkpoint": path.name, "files": files}, indent=2) + "\n"
        write_atomically(self.directory / _MANIFEST, lambda temporary: temporary.write_text(text))
        for other in (*self.directory.glob("step-*"), *self.directory.glob(".step-*.partial")):
            if other.is_dir() and other != path:
                shutil.rmtree(other)
            elif other != path:
                other.unlink()

    def restore(self) -> bool:
        """Bring the parts into the saved state, if there is one.

        Returns:
            Whether there was one.

        Raises:
            ValueError: the checkpoint is damaged, or one of another model, dtype, plan or other settings.
            Exception: what a part raises that cannot load its state.
            In every case the parts are as they were; but batches that came from a generator are gone.
        """
        path = on_first_process(self._verified)
        if path is None:
            return False
        metadata = read_metadata(path)
        difference = _difference(json.loads(metadata["settings"]), self._settings)
        if difference is not None:
            name, theirs, ours = difference
            raise ValueError(
                f"{self.directory} holds a run with {name} = {theirs}, and this one has {ours}: go on as that run "
                "began, or choose another directory"
            )
        trees = json.loads(metadata["tree"])
        shapes: dict[str, tuple[list[int], str]] = {}
        for tree in trees.values():
            _join(tree, lambda name, shape, dtype: shapes.update({name: (shape, dtype)}))
        self._check_parts(trees, shapes)
        tensors = read_tensors(path, shapes, self._places(shapes).get)
        states = {name: _join(tree, lambda name, *_: tensors[name]) for name, tree in trees.items()}
        before = {name: copy.deepcopy(_state_of(part)) for name, part in self._parts.items()}
        try:
            for name in self._parts:
                self._load(name, states[name])
        except BaseException:
            for name in self._parts:
                with suppress(Exception):  # the part that cannot load may not load this either
                    self._load(name, before[name])
            raise
        self.step = int(metadata["step"])
        logger.info("going on from step %d of %s", self.step, self.directory)
        return True

    def _load(self, name: str, state: Any) -> None:
        part = self._parts[name]
        if isinstance(part, torch.Generator):
            part.set_state(state)
        else:
            part.load_state_dict(state)

    def _verified(self) -> Path | None:
        manifest_path = self.directory / _MANIFEST
        if not manifest_path.exists():
            return None
        remedy = "restore it from a copy, or remove the directory to start from the beginning"
        try:
            manifest = json.loads(manifest_path.read_text())
            path = self.directory / manifest["checkpoint"]
            files = [(self.directory / name, file["bytes"], file["sha256"]) for name, file in manifest["files"].items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{manifest_path} is damaged ({error!r}): {remedy}") from error
        for file, size, digest in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing, though {_MANIFEST} names it: {remedy}")
            if file.stat().st_size != size:
                raise ValueError(f"{file} is truncated: {file.stat().st_size} bytes of {size}; {remedy}")
            if _sha256(file) != digest:
                raise ValueError(f"{file} is damaged: its SHA-256 is not that of {_MANIFEST}; {remedy}")
        return path

    def _check_parts(self, trees: Mapping[str, Any], shapes: Mapping[str, tuple[list[int], str]]) -> None:
        if trees.keys() != self._parts.keys():
            raise ValueError(
                f"{self.directory} holds a run with the parts {', '.join(trees)}, and this one has "
                f"{', '.join(self._parts)}: go on as that run began, or choose another directory"
            )
        theirs = {name: (tuple(shape), dtype) for name, (shape, dtype) in shapes.items() if name.startswith("model/")}
        ours = {
            f"model/{name}": (tuple(tensor.shape), dtype_name(tensor.dtype))
            for name, tensor in self._parts["model"].state_dict().items()
        }
        for name in sorted(ours.keys() | theirs.keys()):
            missing = ("no shape", "no dtype")
            for there, here in zip(theirs.get(name, missing), ours.get(name, missing), strict=True):
                if there != here:
                    name = name.removeprefix("model/")
                    raise ValueError(
                        f"{self.directory} holds a run of another model: {name!r} has {there} there and {here} here"
                    )
        for name, part in self._parts.items():
            if isinstance(part, torch.Generator):  # the states of each kind of device have a size of their own
                theirs, ours = shapes[name][0], list(part.get_state().shape)
                if theirs != ours:
                    raise ValueError(
                        f"{self.directory} holds a run whose generator {name!r} was on another kind of device than "
                        f"{part.device.type} (a state of {theirs[0]} bytes there, {ours[0]} here): go on where that "
                        "run began, or choose another directory"
                    )

    def _places(self, shapes: Mapping[str, tuple[list[int], str]]) -> dict[str, Tensor]:
        """Name -> a DTensor that is spread over the processes as the tensor of that name must be."""
        places: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            _split(_state_of(part), name, places)
            if isinstance(part, Optimizer):  # a new one has no moments yet; they are spread as their parameters
                parameters = [parameter for group in part.param_groups for parameter in group["params"]]
                for key, (shape, _) in shapes.items():
                    prefix, *index = key.split("/")[:3]
                    if prefix == name and index[:1] == ["state"] and shape == list(parameters[int(index[1])].shape):
                        places[key] = parameters[int(index[1])].detach()
        return {name: tensor for name, tensor in places.items() if isinstance(tensor, DTensor)}


def _state_of(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors`` and named by their path. Dict keys keep their type."""
    if isinstance(value, Tensor):
        # Copied: safetensors takes no two tensors that share memory, as tied weights do.
        value = value.detach()
        tensors[path] = value if isinstance(value, DTensor) else value.to("cpu", copy=True).contiguous()
        return {"tensor": [path, list(value.shape), dtype_name(value.dtype)]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _join(node: dict[str, Any], tensor: Callable[[str, list[int], str], Any]) -> Any:
    """What :func:`_split` took apart; ``tensor`` answers a name, shape and dtype."""
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensor(*content)
    if kind == "dict":
        return {key: _join(item, tensor) for key, item in content}
    if kind == "list":
        return [_join(item, tensor) for item in content]
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


class ProcessState:
    """What differs from process to process: the place in the data, and the states of torch's default generators.

    The state of every process is saved, and each goes on with its own where they are as many again. In another number
    of processes that of the first serves all, and a warning says what that means.

    Args:
        data: of this process.
        device: the generators are the CPU's, and that of this device if it is a CUDA one.
    """

    def __init__(self, data: RepeatedBatches, device: torch.device) -> None:
        self._data = data
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, which must call this together."""
        own = {"data": self._data.state_dict(), "cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self._device)
        return {"processes": of_all_processes(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set them; a state of a device that this run does not use is left out.

        Raises:
            ValueError: see :meth:`RepeatedBatches.load_state_dict`.
        """
        rank, world = rank_and_world()
        saved = state["processes"]
        own = saved[rank if len(saved) == world else 0]
        self._data.load_state_dict(own["data"])  # first, because it draws
        torch.set_rng_state(own["cpu"])
        if self._device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self._device)
        if len(saved) == world:
            return
        if rank == 0:
            logger.warning(
                "a run of %d processes goes on in %d: all take the place in the data that the first had. The losses go "
                "on alike if every process draws the order of the data alike; what a model draws itself, as dropout "
                "does, is not what it would have been",
                len(saved),
                world,
            )
        else:  # lest all drop out alike
            torch.manual_seed(int(torch.randint(2**62, ())) + rank)
