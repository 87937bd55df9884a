"""Building the C++: no compiler, a failing one, two builders at once, and processors that this machine is not."""

import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsedm_compile.kernels.cpu import build
from sparsedm_compile.kernels.cpu.kernel import CpuKernel
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.pattern import Pattern

SPEC = LayerSpec("linear", (8, 8), Pattern(2, 4))

pytestmark = pytest.mark.skipif(os.name != "posix", reason="compilers are shell scripts here")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not built anything yet, with an empty cache."""
    monkeypatch.setattr(build, "_load_once", functools.cache(build._load_once.__wrapped__))
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def compiler(folder: Path, script: str) -> str:
    path = folder / "fake-compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_compiler_refuses_and_warns_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with caplog.at_level(logging.WARNING):
        reasons = [CpuKernel().refusal(SPEC) for _ in range(3)]
    assert all("no C++ compiler: looked for g++, clang++, c++" in reason for reason in reasons)
    assert len(caplog.records) == 1


def test_failed_build_quotes_the_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler(fresh, 'case "$*" in *-dM*) exit 0;; esac; echo "ops.cpp: no room" >&2; exit 3'))
    with caplog.at_level(logging.WARNING):
        reason = CpuKernel().refusal(SPEC)
    assert "status 3" in reason
    assert "ops.cpp: no room" in reason
    assert len(caplog.records) == 1
    assert list((fresh / "cache").iterdir()) == []


def test_unwritable_cache_names_the_variable(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("CXX", compiler(fresh, "exit 0"))
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(fresh / "file" / "below"))
    assert "set SPARSEDM_CACHE_DIR" in CpuKernel().refusal(SPEC)


def test_broken_library_refuses(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'case "$*" in *-dM*) exit 0;; esac; while [ "$1" != -o ]; do shift; done; echo junk > "$2"'
    monkeypatch.setenv("CXX", compiler(fresh, script))
    assert "cannot be loaded" in CpuKernel().refusal(SPEC)


def test_build_is_lazy_and_meta_never_compiles(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compile_library", lambda: pytest.fail("compiled"))
    assert CpuKernel().refusal(LayerSpec("linear", (8, 8), Pattern(2, 4), device="meta")) is not None
    assert CpuKernel().refusal(LayerSpec("linear", (8, 8), Pattern(2, 4), dtype=torch.float64)) is not None


def test_two_builders_at_once(fresh: Path) -> None:
    """Both start before either ends (each compiler waits for the other's mark), and neither disturbs the other."""
    script = f"""
case "$*" in *-dM*) exit 0;; esac
while [ "$1" != -o ]; do shift; done
printf half > "$2"; touch "{fresh}/mark-$$"
for i in $(seq 100); do [ $(ls "{fresh}" | grep -c mark-) -ge 2 ] && break; sleep 0.1; done
printf ' and whole' >> "$2"
"""
    environment = {**os.environ, "CXX": compiler(fresh, script), "SPARSEDM_CACHE_DIR": str(fresh / "cache")}
    code = "from sparsedm_compile.kernels.cpu.build import compile_library; print(compile_library())"
    builders = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert len(list(fresh.glob("mark-*"))) == 2
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "half and whole"
    assert len(list((fresh / "cache").iterdir())) == 1


def test_fingerprint_tells_processors_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which("g++")
    if found is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    names = set()
    for march in ("x86-64", "haswell", "skylake-avx512"):
        monkeypatch.setenv("SPARSEDM_CPU_MARCH", march)
        names.add(build._fingerprint(found))
    assert len(names) == 3


# On a processor with AVX2 alone, that width is what every other test runs.
NARROWER = ["haswell", "x86-64-v2"] if "AVX512" in torch.backends.cpu.get_cpu_capability() else ["x86-64-v2"]


@pytest.mark.parametrize("march", NARROWER)
def test_other_vector_widths(march: str) -> None:
    """The kernel's own tests, with 32- and 16-byte vectors: what AVX2 machines and, by width, NEON ones run."""
    if platform.machine() != "x86_64" or "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("needs an x86-64 processor with AVX2")
    if CpuKernel().refusal(SPEC) is not None:
        pytest.skip("no C++ compiler here")
    folder = Path(__file__).parent
    tests = [str(folder / name) for name in ("test_cpu_kernel.py", "test_cpu_shared_rows.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "SPARSEDM_CPU_MARCH": march}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parents[1], check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout, done.stdout[-500:]
