import itertools

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from sparsedm_compile.data_position import RepeatedBatches


class Noisy(Dataset):
    """Elements with augmentation drawn from torch's default generator."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item()])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS = {
    "list": lambda: [torch.tensor([i]) for i in range(5)],
    "in order": lambda: DataLoader(Noisy(), 2),
    "shuffled": lambda: DataLoader(Noisy(), 2, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 2, shuffle=True, generator=generator()),
    "own sampler": lambda: DataLoader(Noisy(), 2, sampler=RandomSampler(Noisy(), True, 9, generator())),
    "distributed": lambda: DataLoader(Noisy(), 2, sampler=DistributedSampler(Noisy(), 2, 1)),
}


def take(batches: RepeatedBatches, n: int) -> list[torch.Tensor]:
    """``n`` batches, with the draws of a training loop between them."""
    found = []
    for batch in itertools.islice(batches, n):
        found.append(batch)
        torch.rand(3)
    return found


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 9, 12])
@pytest.mark.parametrize("kind", LOADERS)
def test_going_back_gives_the_batches_that_followed(kind, taken):
    torch.manual_seed(0)
    batches = RepeatedBatches(LOADERS[kind]())
    take(batches, taken)
    position, random = batches.state_dict(), torch.get_rng_state()
    expected = take(batches, 12)

    torch.manual_seed(99)
    again = RepeatedBatches(LOADERS[kind]())
    again.load_state_dict(position)
    torch.set_rng_state(random)
    assert all(torch.equal(a, b) for a, b in zip(take(again, 12), expected, strict=True))


def test_passes_differ_in_their_order():
    """Also under a DistributedSampler, which repeats itself unless it is told the number of the pass."""
    for kind in ("shuffled", "distributed"):
        loader = LOADERS[kind]()
        indices = torch.cat([batch[:, 0] for batch in take(RepeatedBatches(loader), 4 * len(loader))]).chunk(4)
        assert len({tuple(order.tolist()) for order in indices}) > 1


def test_a_generator_is_gone_through_once():
    batches = RepeatedBatches(iter(range(10)))
    assert take(batches, 4) == [0, 1, 2, 3]
    again = RepeatedBatches(iter(range(10)))
    again.load_state_dict(batches.state_dict())
    assert take(again, 6) == [4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="batches ended after 10 and cannot be gone through again"):
        next(again)


def test_other_data_is_refused():
    batches = RepeatedBatches([1, 2, 3])
    take(batches, 3)
    with pytest.raises(ValueError, match="3 batches into a pass, and these batches end after 2"):
        RepeatedBatches([1, 2]).load_state_dict(batches.state_dict())
    with pytest.raises(ValueError, match="has 1 random generators, these batches 2: build the DataLoader as before"):
        RepeatedBatches(LOADERS["own generator"]()).load_state_dict(batches.state_dict())


def test_empty():
    with pytest.raises(ValueError, match="batches is empty"):
        next(RepeatedBatches([]))
