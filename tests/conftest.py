"""Keeps the tests' kernel choices and compiled graphs apart from the user's and from each other."""

import pytest
import torch

from sparsedm_compile.kernels.cpu import build


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
