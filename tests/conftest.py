"""Keeps the tests' kernel choices and compiled graphs apart from the user's and from each other."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from sparsedm_compile.kernels.cpu import build
from sparsedm_compile.pattern import Pattern


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """A cache directory for this run: choices measured by a test must not become the user's, nor the reverse.

    The compiled C++ depends on nothing that a test does, so the user's build is linked in, not built again.
    """
    directory = tmp_path_factory.mktemp("cache")
    try:
        library = build.compile_library()
    except build.BuildError:
        pass  # no compiler: a supported state
    else:
        (directory / library.name).symlink_to(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEDM_CACHE_DIR", str(directory))
        yield directory


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled graphs, recompile limits and counters of one test must not reach the next."""
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _keep_largest(weight: Tensor, pattern: Pattern) -> Tensor:
    """The magnitude mask by sorting, which is neither how the package does it nor slow."""
    rows = weight.detach().movedim(1, -1)  # (out, *kernel, in)
    channels = rows.abs().float().unflatten(0, (-1, pattern.v)).unbind(1)
    score = functools.reduce(torch.add, channels).unflatten(-1, (-1, pattern.m))
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < pattern.n).flatten(-2).repeat_interleave(pattern.v, 0).movedim(-1, 1)


@pytest.fixture(scope="session")
def masked_dense():
    """``masked_dense(model)``: a copy whose layers are dense and whose weights are masked once and for all."""

    def mask(model: nn.Module) -> nn.Module:
        reference = copy.deepcopy(model)
        for module in reference.modules():
            pattern = Pattern.parse(getattr(module, "pattern", "dense"))
            if not pattern.is_dense:
                module.weight = nn.Parameter(module.weight.detach() * _keep_largest(module.weight, pattern))
                module.pattern = "dense"
        return reference

    return mask
