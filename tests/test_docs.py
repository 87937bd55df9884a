"""What the docs name exists, and the tests that they point to are found."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLAIMS = (ROOT / "docs" / "claims.md").read_text()
COMMANDS = re.findall(r"`pytest ([^`]+)`", CLAIMS)


def test_all_twelve_claims_are_there():
    assert re.findall(r"^\| (\d+) \|", CLAIMS, flags=re.MULTILINE) == [str(i) for i in range(1, 13)]


def test_paths_exist():
    paths = [word for command in COMMANDS for word in shlex.split(command) if word.startswith("tests/")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", [command for command in COMMANDS if " -k " in command])
def test_selected_tests_exist(command):
    arguments = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-q", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout  # 5 where nothing matches
