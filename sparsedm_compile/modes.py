"""Training and evaluation mode, module by module: a model may keep some of its modules in evaluation mode for good."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Each module of ``model`` has its own mode back after the block, whatever the block set."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode; each gets its own mode back."""
    with keeping_modes(model):
        model.eval()
        yield
