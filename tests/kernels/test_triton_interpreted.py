"""Runs ``interpreted/`` in a process of its own: Triton decides when it is imported whether to interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_are_right_in_the_interpreter():
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        Path(__file__).parent / "interpreted",
    ]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
