import io

import numpy as np
import pytest
import torch
from PIL import Image

from sparsedm_compile.recipes.config import DataConfig
from sparsedm_compile.recipes.data import load_images


def arrays(channels=0):
    random = np.random.default_rng(0)
    shape = (6, 4, 4, channels) if channels else (6, 4, 4)
    return {
        "x_train": random.integers(0, 256, shape, dtype=np.uint8),
        "y_train": np.arange(6, dtype=np.uint8),
        "x_test": random.integers(0, 256, shape, dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.uint8),
    }


@pytest.mark.parametrize("channels", [0, 3])
def test_npz(tmp_path, channels):
    stored = arrays(channels)
    np.savez(tmp_path / "x.npz", **stored)
    data = load_images(DataConfig("npz", "x.npz"), tmp_path)
    assert data.train.shape == (6, max(1, channels), 4, 4)
    assert data.train.dtype == torch.float32
    assert data.test_labels.tolist() == list(range(6))
    pixel = stored["x_test"][2, 1, 3]
    assert data.test[2, :, 1, 3].tolist() == pytest.approx(np.atleast_1d(pixel / 127.5 - 1.0).tolist(), abs=1e-6)


def test_jpeg_pair(tmp_path):
    colours = [(250, 10, 20), (10, 250, 30), (40, 50, 250)]
    for split in ("train", "test"):
        coded = []
        for colour in colours:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), colour).save(buffer, "JPEG", quality=95)
            coded.append(buffer.getvalue())
        offsets = np.cumsum([0, *map(len, coded)])
        jpeg = np.frombuffer(b"".join(coded), dtype=np.uint8)
        np.savez(tmp_path / f"c_{split}.npz", jpeg=jpeg, offsets=offsets, labels=np.arange(3))
    data = load_images(DataConfig("npz", "c_{split}.npz"), tmp_path)
    middle = (data.test[:, :, 4, 4] + 1) * 127.5
    assert torch.allclose(middle, torch.tensor(colours).float(), atol=4)  # a JPEG of one colour is off by a few levels


def test_digits_are_split_without_overlap():
    data = load_images(DataConfig("digits"), None)
    assert data.train.shape == (1297, 1, 8, 8)
    assert data.test.shape == (500, 1, 8, 8)
    from sklearn import datasets

    digits = datasets.load_digits()
    trained = {image.numpy().tobytes() for image in data.train}
    assert not any(image.numpy().tobytes() in trained for image in data.test)
    by_pixels = {image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)}
    for image, label in zip(data.test[:50], data.test_labels[:50], strict=True):
        assert by_pixels[((image[0].double() + 1) * 8).numpy().tobytes()] == label


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="pass the folder that holds it"):
        load_images(DataConfig("npz", "x.npz"), None)
    with pytest.raises(FileNotFoundError, match="must be an npz with x_train, y_train, x_test, y_test"):
        load_images(DataConfig("npz", "x.npz"), tmp_path)
    np.savez(tmp_path / "x.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match="lacks x_test, y_test, y_train; it has x_train"):
        load_images(DataConfig("npz", "x.npz"), tmp_path)
    np.savez(tmp_path / "x.npz", **(arrays() | {"x_test": np.zeros((6, 4, 4))}))
    with pytest.raises(ValueError, match=r"must be uint8 .* got float64 \(6, 4, 4\)"):
        load_images(DataConfig("npz", "x.npz"), tmp_path)
    np.savez(tmp_path / "x.npz", **(arrays() | {"y_test": np.arange(5)}))
    with pytest.raises(ValueError, match=r"6 images but labels of shape \(5,\)"):
        load_images(DataConfig("npz", "x.npz"), tmp_path)
    with pytest.raises(ValueError, match=r"valid are 'digits' and 'npz'"):
        DataConfig("mnist")
