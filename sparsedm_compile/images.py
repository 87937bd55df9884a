"""Images to files with nothing but the standard library, and side by side as a figure."""

import struct
import zlib
from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path

import torch
from torch import Tensor


def write_grid(path: Path, images: Tensor, *, columns: int | None = None, least_side: int = 64) -> None:
    """Write images side by side as one PNG, small ones enlarged without smoothing.

    Args:
        images: ``(N, 1 or 3, H, W)`` in [-1, 1]; values beyond are clipped.
        columns: of the grid; nearly square unless given.
        least_side: images smaller than this are enlarged by a whole factor.

    Raises:
        ValueError: another shape, or values that are not finite.
        OSError: the file cannot be written.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (N, 1 or 3, H, W)")
    if not images.isfinite().all():
        raise ValueError("images holds values that are not finite")
    count, channels, height, width = images.shape
    columns = columns or ceil(sqrt(count))
    rows = ceil(count / columns)
    bytes_ = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    blank = bytes_.new_zeros(rows * columns - count, channels, height, width)
    grid = torch.cat([bytes_, blank]).unflatten(0, (rows, columns))
    grid = grid.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    factor = max(1, ceil(least_side / max(height, width)))
    grid = grid.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    path.write_bytes(_png(grid))


def sample_figure(rows: Mapping[str, Tensor], columns: int = 16):
    """Samples of several models as a matplotlib figure, one labelled row a model; column k is the same noise in each.

    Args:
        rows: label -> images ``(N, 1 or 3, H, W)`` in [-1, 1]; values outside are clipped.
        columns: how many images of each row to show, at most N.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    columns = min(columns, *(len(images) for images in rows.values()))
    label_width = 1 + 0.06 * max(map(len, rows))  # inches, at the font size below
    figure = Figure(figsize=(0.6 * columns + label_width, 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            pixels = ((image.permute(1, 2, 0).numpy(force=True) + 1) / 2).clip(0, 1)
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def _png(image: Tensor) -> bytes:
    """Encode uint8 ``(H, W, 1 or 3)`` (PNG specification, third edition; colour types 0 and 2)."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = torch.zeros(height, 1 + width * channels, dtype=torch.uint8)  # each line starts with its filter: none
    lines[:, 1:] = image.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(lines.numpy().tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
