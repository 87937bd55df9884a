"""The images of a recipe: training and test split, with labels."""

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsedm_compile.recipes.config import DataConfig


@dataclass(frozen=True)
class ImageData:
    """Images in [-1, 1], float32 ``(N, C, H, W)``, and int64 labels ``(N,)``."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_images(config: DataConfig, folder: Path | None) -> ImageData:
    """Load both splits.

    Args:
        folder: where ``config.file`` lies; None only for data that needs no file.

    Raises:
        ValueError: ``folder`` is missing, or a file holds something else than the docstring of
            :class:`DataConfig` says.
        OSError: a file cannot be read.
        ImportError: scikit-learn (digits) or Pillow (JPEG) is missing.
    """
    if config.name == "digits":
        return _digits()
    if folder is None:
        raise ValueError(f"this recipe needs {config.file}: pass the folder that holds it (--data)")
    if "{split}" in config.file:
        splits = [_jpeg(folder / config.file.replace("{split}", split)) for split in ("train", "test")]
    else:
        path = _existing(folder / config.file)
        with np.load(path) as arrays:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(arrays)
            if missing:
                raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; it has {', '.join(arrays)}")
            splits = [(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test")]
    (train, train_labels), (test, test_labels) = (_checked(config.file, *split) for split in splits)
    return ImageData(train, train_labels, test, test_labels)


def _digits() -> ImageData:
    from sparsedm_compile.demo.digits import load_labelled_digits

    return ImageData(*load_labelled_digits())


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: it must be an npz with x_train, y_train, x_test, y_test (uint8 images), or one of "
            "a pair *_train.npz and *_test.npz of JPEG images (jpeg, offsets, labels); see docs/quality.md"
        )
    return path


def _jpeg(path: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(_existing(path)) as arrays:
        jpeg, offsets, labels = arrays["jpeg"].tobytes(), arrays["offsets"], arrays["labels"]
    images = [np.asarray(Image.open(io.BytesIO(jpeg[start:end]))) for start, end in itertools.pairwise(offsets)]
    return np.stack(images), labels


def _checked(name: str, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise ValueError(
            f"{name}: images must be uint8 (N, H, W) or (N, H, W, channels), got {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{name}: {len(images)} images but labels of shape {labels.shape}")
    pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)
    return pixels.float().div(127.5).sub(1).contiguous(), torch.from_numpy(labels.astype(np.int64))
