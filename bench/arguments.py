"""Types of the arguments that benchmarks share, so that argparse refuses them in one line, before anything is timed."""

from argparse import ArgumentTypeError
from pathlib import Path

import torch

from sparsedm_compile.cli.common import check_place
from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.pattern import Pattern

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def dtypes(text: str) -> list[torch.dtype]:
    """``"float32,bfloat16"``: those that the CPU kernels take."""
    for name in text.split(","):
        if name not in DTYPES:
            raise ArgumentTypeError(f"unknown dtype {name!r}; valid are {', '.join(DTYPES)}, several by comma")
    return [DTYPES[name] for name in dict.fromkeys(text.split(","))]


def patterns(text: str) -> list[str]:
    """``"2:4,1:4v4"``; not ``"dense"``, which each is held against."""
    for name in text.split(","):
        try:
            dense = Pattern.parse(name).is_dense
        except ValueError as error:
            raise ArgumentTypeError(f"{error}; several by comma, such as 2:4,1:4v4") from error
        if dense:
            raise ArgumentTypeError("dense is what each pattern is held against; name sparse ones, such as 2:4,1:4v4")
    return list(dict.fromkeys(text.split(",")))


def counts(text: str) -> list[int]:
    """``"4,1"``: whole numbers from 1."""
    for number in text.split(","):
        if not (number.isdecimal() and int(number) > 0):
            raise ArgumentTypeError(f"{number!r} is not a whole number of at least 1; several by comma, such as 4,1")
    return list(dict.fromkeys(map(int, text.split(","))))


def file_to_write(text: str) -> Path:
    """A path at which nothing stands in the way of a file: told before the minutes of timing. Nothing is made yet."""
    path = Path(text)
    try:
        check_place("the path", path)
    except OSError as error:
        raise ArgumentTypeError(str(error)) from error
    return path
