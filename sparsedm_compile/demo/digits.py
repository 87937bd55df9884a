"""The demo's data and model: scikit-learn's handwritten digits and a U-ViT small enough to train on a laptop."""

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from sparsedm_compile.demo.requirements import check_requirements
from sparsedm_compile.models import UViT

#: 1,797 images of 8 x 8; this many are for training, the others for measuring.
TRAIN_IMAGES = 1297
_CHECKPOINT = "digits-uvit.safetensors"


def load_digits() -> tuple[Tensor, Tensor]:
    """The training and the test images of :func:`load_labelled_digits`."""
    train, _, test, _ = load_labelled_digits()
    return train, test


def load_labelled_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The images, shuffled and split once and for all; no download, they are part of scikit-learn.

    Returns:
        ``(train, train_labels, test, test_labels)``: float32 in [-1, 1], ``(1297, 1, 8, 8)`` and ``(500, 1, 8, 8)``;
        labels int64.

    Raises:
        ImportError: see :func:`check_requirements`.
    """
    check_requirements()
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1  # grey levels are 0 to 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))  # the same in every version of NumPy
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return images[train], labels[train], images[test], labels[test]


def batches(images: Tensor, batch: int = 128, seed: int = 0) -> DataLoader:
    """Shuffled batches ``(batch, 1, 8, 8)``, in an order fixed by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(images, batch, shuffle=True, drop_last=True, generator=generator)


def create_model() -> UViT:
    """The demo's U-ViT with random weights: 17 tokens of width 128, 5 blocks, 1.1 million parameters."""
    return UViT(img_size=8, patch_size=2, in_chans=1, embed_dim=128, depth=4, num_heads=4)


def load_model(path: Path | str | None = None) -> UViT:
    """The pretrained dense model, in float32 and eval mode.

    Args:
        path: of another checkpoint than the one in the package, made by ``python -m sparsedm_compile.demo.pretrain``.
    """
    model = create_model()
    with resources.as_file(resources.files("sparsedm_compile") / "data" / _CHECKPOINT) as packaged:
        state = load_file(path or packaged)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model.eval()


def save_model(model: UViT, path: Path | str) -> None:
    """Write the weights in half precision, which is how the package carries them: 2.2 MB."""
    save_file({name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}, path)
