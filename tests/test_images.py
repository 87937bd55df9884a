"""write_grid, read back by another library."""

import numpy as np
import pytest
import torch

from sparsedm_compile.images import write_grid

image_module = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_arrive_where_they_belong(tmp_path, channels):
    grey = torch.arange(5 * channels * 2 * 3).reshape(5, channels, 2, 3)  # grey levels, all different
    write_grid(tmp_path / "grid.png", grey / 127.5 - 1, columns=2, least_side=1)
    pixels = np.asarray(image_module.open(tmp_path / "grid.png")).reshape(6, 6, channels)
    for i in range(5):
        row, column = divmod(i, 2)
        cell = pixels[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert (cell == grey[i].permute(1, 2, 0).numpy()).all()
    assert (pixels[4:, 3:] == 0).all()


def test_values_are_clipped_and_small_images_enlarged(tmp_path):
    write_grid(tmp_path / "grid.png", torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2), least_side=8)
    pixels = np.asarray(image_module.open(tmp_path / "grid.png"))
    assert pixels.shape == (4, 8)
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 4, 8, 8), r"\(1, 4, 8, 8\), expected"),
        (torch.zeros(8, 8), "expected"),
        (torch.zeros(0, 1, 8, 8), "expected"),
        (torch.full((1, 1, 8, 8), float("nan")), "not finite"),
    ],
)
def test_refuses_what_is_no_image(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        write_grid(tmp_path / "grid.png", images)
