"""One forward pass a benchmark, to hold one commit against another; bench/end_to_end.py holds sparse against dense.

pytest bench --benchmark-autosave [--benchmark-compare]
"""

import pytest
import torch

from sparsedm_compile import sparsify
from sparsedm_compile.model_spec import load_model


@pytest.mark.parametrize("pattern", ["dense", "2:4", "2:4v4"])
@pytest.mark.parametrize("batch", [1, 4], ids="batch{}".format)
def test_uvit_small(benchmark, batch, pattern):
    torch.manual_seed(0)
    loaded = load_model("uvit-s/2", batch=batch)
    if pattern != "dense":
        sparsify(loaded.model, pattern, policy="sparsedm")
    compiled = torch.compile(loaded.model, backend="sparsedm")
    with torch.no_grad():
        compiled(*loaded.inputs)
        benchmark(compiled, *loaded.inputs)
