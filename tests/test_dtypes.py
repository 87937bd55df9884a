import re
from pathlib import Path

import pytest
import torch

from sparsedm_compile.dtypes import dtype_name

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_name_leads_back_to_its_dtype(dtype):
    assert getattr(torch, dtype_name(dtype)) is dtype


def test_no_other_file_spells_a_dtype_its_own_way():
    for folder in ("sparsedm_compile", "kernels", "passes", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            spelled = re.search(r"removeprefix\(.torch\.|str\([\w.]*dtype\)\[", path.read_text())
            assert not spelled or path.name == "dtypes.py", path
