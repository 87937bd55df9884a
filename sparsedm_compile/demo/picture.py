"""Samples of several models side by side in one picture."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def save_picture(rows: Mapping[str, Tensor], path: Path, columns: int = 16) -> None:
    """Write a PNG with one labelled row a model; column k shows what each made of the same noise.

    Args:
        rows: label -> images ``(N, 1, H, W)`` in [-1, 1]; values outside are clipped.
        path: of the PNG.
        columns: how many images of each row to show, at most N.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    columns = min(columns, *(len(images) for images in rows.values()))
    figure = Figure(figsize=(0.6 * columns + 1.4, 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image[0].numpy(force=True), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)
