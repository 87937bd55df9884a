"""Fine-tunes a tiny model in one process, under DDP and under FSDP2, and writes what came of each.

A script and no test: it forks the processes of each case, which spares them the imports, so it must have no threads.
``distributed_training.py FOLDER`` writes ``CASE.pt`` for each case.
"""

import copy
import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sparsedm_compile.distributed import on_first_process, sharded_mask, share_of
from sparsedm_compile.finetune import finetune
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import unwrap
from sparsedm_compile.sparsify import sparsify

#: Case -> how the model is spread, processes, and arguments of finetune. 12 rows on 2 processes: with v = 4, the second
#: group of channels lies on both.
CASES: dict[str, tuple[str, int, dict]] = {
    "one": ("plain", 1, {}),
    "ddp": ("ddp", 2, {}),
    "fsdp": ("fsdp", 2, {}),
    "one-fixed": ("plain", 1, {"fixed_mask": True}),
    "fsdp-fixed": ("fsdp", 2, {"fixed_mask": True}),
    "one-flexible": ("plain", 1, {"patterns": ["dense", "2:4v4", "1:4v2"]}),
    "ddp-flexible": ("ddp", 2, {"patterns": ["dense", "2:4v4", "1:4v2"]}),
    "fsdp-flexible": ("fsdp", 2, {"patterns": ["dense", "2:4v4", "1:4v2"]}),
    # Those that stop, and how they go on.
    "fsdp-stopped": ("fsdp", 2, {"steps": 5, "checkpoint_dir": "fsdp.run", "fixed_mask": True}),
    "fsdp-to-one": ("plain", 1, {"checkpoint_dir": "fsdp.run", "fixed_mask": True}),
    "one-stopped": ("plain", 1, {"steps": 5, "checkpoint_dir": "one.run", "fixed_mask": True}),
    "one-to-fsdp": ("fsdp", 2, {"checkpoint_dir": "one.run", "fixed_mask": True}),
    "ddp-stopped": ("ddp", 2, {"steps": 5, "checkpoint_dir": "ddp.run"}),
    "ddp-to-fsdp-of-3": ("fsdp", 3, {"checkpoint_dir": "ddp.run"}),
    "fsdp-of-3-to-ddp": ("ddp", 2, {"checkpoint_dir": "ddp.run", "steps": 12}),
    "one-long": ("plain", 1, {"steps": 12}),
    # Each process shuffles and drops out in a way of its own, which only its own random state brings back.
    "ddp-dropout": ("ddp", 2, {"dropout": 0}),
    "ddp-dropout-stopped": ("ddp", 2, {"dropout": 0, "steps": 5, "checkpoint_dir": "ddp-dropout.run"}),
    "ddp-dropout-resumed": ("ddp", 2, {"dropout": 7, "checkpoint_dir": "ddp-dropout.run"}),
    "fsdp-dropout": ("fsdp", 2, {"dropout": 0}),
    "fsdp-dropout-stopped": ("fsdp", 2, {"dropout": 0, "steps": 5, "checkpoint_dir": "fsdp-dropout.run"}),
    "fsdp-dropout-resumed": ("fsdp", 2, {"dropout": 7, "checkpoint_dir": "fsdp-dropout.run"}),
    # One process cannot go on; all must say so.
    "fsdp-nan": ("fsdp", 2, {"poison": True}),
}


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.drop, self.out = nn.Linear(16, 12), nn.Dropout(0), nn.Linear(12, 16)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        hidden = self.into(x.flatten(1)) + timesteps.unsqueeze(1) / 999
        return self.out(self.drop(torch.tanh(hidden))).view_as(x)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(rank: int, world: int, case: str, folder: Path) -> dict:
    how, _, arguments = CASES[case]
    torch.manual_seed(0)
    teacher = Denoiser()
    model = copy.deepcopy(teacher)
    sparsify(model, "2:4v4", policy="all")
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp":
        fully_shard(model.into)
        fully_shard(model)
    options = {"steps": 10, "learning_rate": 1e-2, "warmup_steps": 3, "ema_decay": 0.8, "srste_decay": 0.1, **arguments}
    options |= {"checkpoint_every": 5, "progress": False}
    if "checkpoint_dir" in options:
        options["checkpoint_dir"] = folder / options["checkpoint_dir"]
    data = torch.randn(4, 12, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    batches: Any = [share_of(batch) for batch in data]
    if "dropout" in options:
        unwrap(model).drop.p = 0.5
        batches = DataLoader(torch.cat(batches), len(batches[0]), shuffle=True)
        torch.manual_seed(options.pop("dropout") + rank)
    if options.pop("poison", False) and rank == world - 1:
        batches[2][0] = torch.nan
    teacher = None if "patterns" in options else teacher
    result: dict = {}
    try:
        result["losses"] = finetune(model, teacher, batches, **options).losses
    except FloatingPointError as error:
        result["error"] = str(error)
    result["state"] = {name.removeprefix("module."): whole(tensor) for name, tensor in model.state_dict().items()}
    if how == "fsdp":
        weight = model.into.weight
        result["masks"] = {pattern: whole(sharded_mask(weight, Pattern.parse(pattern))) for pattern in ("2:4", "2:4v4")}
    return result


def run(rank: int, world: int, case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(folder / f"{case}.store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    # The DDP module must be gone before the group is: if it holds the group last, it ends the group's threads while it
    # holds the interpreter's lock, which a thread that still frees a tensor waits for (seen on torch 2.13: one run in
    # two never ended).
    result = train(rank, world, case, folder)
    gc.collect()
    torch.save(result, folder / f"{case}.{rank}.pt")
    if world > 1:
        on_first_process(lambda: None)  # none leaves before all are done
        dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    for case, (_, world, _) in CASES.items():
        mp.start_processes(run, (world, case, folder), world, start_method="fork")  # if one fails, all end


if __name__ == "__main__":
    main()
