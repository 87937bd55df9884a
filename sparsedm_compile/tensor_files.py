"""Named tensors and text on the disk: one safetensors file, or a folder that each process wrote a part of."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from sparsedm_compile.atomic_write import write_atomically
from sparsedm_compile.distributed import on_first_process, shard_like

_TEXT = "metadata.json"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write ``path.safetensors``, or the folder ``path`` by torch.distributed.checkpoint if there are DTensors.

    Called by all processes alike. What is written appears at its place complete, or not at all.

    Returns:
        The file or folder.

    Raises:
        OSError: in every process, whichever could not write.
    """
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        file = path.with_name(f"{path.name}.safetensors")
        on_first_process(lambda: write_atomically(file, lambda partial: save_file(tensors, partial, metadata)))
        return file
    partial = path.with_name(f".{path.name}.partial")
    on_first_process(lambda: shutil.rmtree(partial, ignore_errors=True))
    try:
        dcp.save(dict(tensors), checkpoint_id=partial)
    except CheckpointException as error:
        raise OSError(f"{path} could not be written: {error}") from error

    def complete() -> None:
        write_atomically(partial / _TEXT, lambda temporary: temporary.write_text(json.dumps(metadata)))
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before anything named it
        partial.rename(path)

    on_first_process(complete)
    return path


def read_metadata(path: Path) -> dict[str, str]:
    """The text of what :func:`write_tensors` returned."""
    if path.is_dir():
        return json.loads((path / _TEXT).read_text())
    with safe_open(path, "pt") as file:
        return file.metadata()


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[list[int], str]], like: Callable[[str], Tensor | None]
) -> dict[str, Tensor]:
    """Read tensors, each spread over the processes as the DTensor that ``like`` gives for its name, or whole.

    Args:
        path: what :func:`write_tensors` returned, in this or any other number of processes.
        shapes: name -> shape and dtype (``"float32"``) of the tensors wanted.
        like: name -> a tensor of the same shape, or None.
    """
    if not path.is_dir():
        with safe_open(path, "pt") as file:
            return {name: _spread(file.get_tensor(name), like(name)) for name in shapes}
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        place = like(name)
        empty = torch.zeros_like(place) if isinstance(place, DTensor) else torch.zeros(shape)
        tensors[name] = empty.to(getattr(torch, dtype))
    dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
    return tensors


def _spread(tensor: Tensor, like: Tensor | None) -> Tensor:
    return tensor if like is None else shard_like(tensor, like)
