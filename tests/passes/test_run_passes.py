"""The ordered list of passes, and graph dumps around them."""

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.options import parse_options
from sparsedm_compile.passes import PASSES, Lowering, run_passes


def lowered(inference=True, **options):
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    sdm.sparsify(model, "2:4", policy="all")
    caught = []

    def backend(gm, example_inputs):
        from sparsedm_compile.backend import _copy

        before = gm.graph.python_code("self").src
        lowering = Lowering(_copy(gm), list(example_inputs), parse_options(options), inference)
        run_passes(lowering)
        caught.append(lowering)
        assert gm.graph.python_code("self").src == before  # Dynamo reads its own graph again
        return gm

    torch.compile(model, backend=backend)(torch.randn(2, 32))
    return caught[0]


def test_order():
    names = [p.__name__ for p in PASSES]
    assert names.index("find_layers") < names.index("insert_masks") < names.index("swap_kernels")
    assert names.index("swap_kernels") < names.index("fuse_epilogues")
    assert all(p.__doc__ for p in PASSES)


def test_training_keeps_the_masks():
    lowering = lowered(inference=False, kernel="reference")
    assert "masked_weight" in lowering.gm.code
    assert "sparsedm.linear" not in lowering.gm.code
    assert lowering.derived == []


def test_inference_swaps_them():
    lowering = lowered(kernel="reference")
    assert "masked_weight" not in lowering.gm.code
    assert "sparsedm.linear" in lowering.gm.code


def test_dumps(tmp_path):
    lowering = lowered(kernel="reference", dump_graphs=tmp_path / "deep" / "er")
    names = sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())
    want = [
        f"graph{lowering.number}_{i}_{p.__name__}_{when}.txt"
        for i, p in enumerate(PASSES)
        for when in ("after", "before")
    ]
    assert names == sorted(want)


@pytest.mark.parametrize("name", [p.__name__ for p in PASSES])
def test_dumps_of_one_pass(tmp_path, name):
    lowered(kernel="reference", dump_graphs=tmp_path, dump_pass=name)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(f"_{name}_" in path.name for path in tmp_path.iterdir())


def test_graphs_of_one_process_do_not_overwrite_each_other(tmp_path):
    for _ in range(2):
        torch._dynamo.reset()
        lowered(kernel="reference", dump_graphs=tmp_path, dump_pass="swap_kernels")
    assert len(list(tmp_path.iterdir())) == 4
