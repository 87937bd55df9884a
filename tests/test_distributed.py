"""Two gloo processes on a CPU against one: the same losses, weights and masks, also when their number changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsedm_compile.distributed import (
    mean_over_processes,
    of_all_processes,
    on_first_process,
    rank_and_world,
    shard_like,
    share_of,
)
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

# Sums over a batch in another order differ in their last bits (1e-7), which AdamW magnifies while its second moments
# are small.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results(case, rank=0)``: what a process of the case saved; see distributed_training.py."""
    if not hasattr(os, "fork") or not torch.distributed.is_gloo_available():
        pytest.skip("needs fork and gloo")
    folder = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_training.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return lambda case, rank=0: torch.load(folder / f"{case}.{rank}.pt")


def assert_same(got: dict, expected: dict) -> None:
    assert got["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    for name, tensor in expected["state"].items():
        torch.testing.assert_close(got["state"][name], tensor, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("ddp", "one"),
        ("fsdp", "one"),
        ("fsdp-fixed", "one-fixed"),
        ("ddp-flexible", "one-flexible"),
        ("fsdp-flexible", "one-flexible"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_equal_one(results, case, reference, rank):
    assert_same(results(case, rank), results(reference))


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("fsdp-to-one", "one-fixed"),
        ("one-to-fsdp", "one-fixed"),
        ("ddp-to-fsdp-of-3", "one"),
        ("fsdp-of-3-to-ddp", "one-long"),
    ],
)
def test_goes_on_in_another_number_of_processes(results, case, reference):
    assert_same(results(case), results(reference))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_each_process_goes_on_with_its_own_random_state(results, how, rank):
    """Each shuffles its data and drops out in a way of its own; the resumed ones began with other seeds."""
    assert_same(results(f"{how}-dropout-resumed", rank), results(f"{how}-dropout", rank))


def test_the_tolerance_is_far_below_what_training_changes(results):
    one, other = results("one"), results("one-fixed")
    assert max(abs(a / b - 1) for a, b in zip(one["losses"], other["losses"], strict=True)) > 20 * TOLERANCE
    assert (one["state"]["into.weight"] - other["state"]["into.weight"]).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize("pattern", ["2:4", "2:4v4"])
@pytest.mark.parametrize("case", ["fsdp", "ddp-to-fsdp-of-3"])
def test_masks_of_a_spread_weight_are_those_of_the_whole(results, case, pattern):
    """12 rows, 6 a process: the second group of 4 channels lies on both. In 3 processes none is split."""
    result = results(case)
    weight = result["state"]["into.weight"]
    expected = magnitude_mask_naive(weight, Pattern.parse(pattern))
    assert torch.equal(result["masks"][pattern], expected)
    if pattern == "2:4v4" and case == "fsdp":
        halves = [magnitude_mask_naive(half, Pattern(2, 4, 2)) for half in weight.split(6)]
        assert not torch.equal(torch.cat(halves), expected)  # what each half alone would choose


def test_a_fixed_mask_is_kept(results):
    for case in ("fsdp-fixed", "one-to-fsdp", "fsdp-to-one"):
        dropped = results(case)["state"]["into.weight"] == 0
        assert torch.equal(dropped, results("one-fixed")["state"]["into.weight"] == 0)
        assert dropped.sum() == dropped.numel() // 2


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_numbers_in_one_process_stop_all(results, rank):
    assert (
        "the loss is nan at step 3; the model keeps the averaged weights of the 2 steps before"
        in (results("fsdp-nan", rank)["error"])
    )
    assert all(torch.isfinite(tensor).all() for tensor in results("fsdp-nan", rank)["state"].values())


class TestOneProcess:
    def test_everything_is_ours(self):
        assert rank_and_world() == (0, 1)
        x = torch.randn(5, 2)
        assert torch.equal(share_of(x), x)
        assert torch.equal(mean_over_processes(x), x)
        assert of_all_processes("ours") == ["ours"]
        assert shard_like(x, torch.zeros(5, 2)) is x

    def test_errors_of_the_first_process_are_raised(self):
        assert on_first_process(lambda: 3) == 3
        with pytest.raises(OSError, match="disk"):
            on_first_process(lambda: (_ for _ in ()).throw(OSError("disk")))
