"""Extra inputs of a lowered graph: the compilation must see their sizes as numbers."""

import torch

import sparsedm_compile as sdm
from sparsedm_compile.models import create_uvit, example_inputs


def test_dense_kernels_of_masked_weights_compile_where_a_guard_needs_their_sizes():
    # The sizes of a masked weight met those of attention's unflatten here, in a guard that nothing could read.
    torch._dynamo.reset()
    model = create_uvit("uvit-s/2", img_size=8, embed_dim=64, depth=2, num_heads=2).eval()
    sdm.sparsify(model, "2:4")
    inputs = example_inputs(model, 1)
    compiled = torch.compile(model, backend="sparsedm", options={"kernel": "dense"}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
