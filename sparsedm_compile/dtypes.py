"""Dtypes by name."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``: the attribute of ``torch`` that it is."""
    return str(dtype).removeprefix("torch.")
