"""Correctness of every GPU kernel against float64, single elements first."""

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import torch
import torch.nn.functional as F
from gpu_runner import Clock, Record, Skipped
from torch import Tensor

from sparsedm_compile.dtypes import dtype_name
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.kernels.registry import Epilogue, Kernel, LayerSpec
from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern

PATTERNS = ("2:4", "1:4", "2:4v64", "1:4v64")
DTYPES = (torch.bfloat16, torch.float16)
# ‖out − reference‖ / ‖reference‖: operands are exact, so one rounding to 8 (bf16) or 11 bits is all there is.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Of kernels that round their operands to 8 bits, int8 about 1e-2 and fp8 4e-2; a wrong one is wrong by about 1.
ROUNDED_TOLERANCE = 0.08
_ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
# (rows, width, tokens)
LINEARS = ((64, 64, 8), (128, 320, 257), (512, 512, 1), (192, 136, 65), (1152, 4608, 1028), (4096, 1024, 4111))
SMALL_LINEARS = LINEARS[:2]
# (C_out, C_in, window, stride, batch, size)
CONVS = ((64, 64, 3, 1, 2, 9), (64, 128, 3, 2, 1, 12), (128, 64, 1, 1, 3, 7), (320, 320, 3, 1, 2, 33))
SMALL_CONVS = CONVS[:2]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def sparse_kernels(device: str) -> list[str]:
    """The kernels to hold against dense on this type of device."""
    names = [name for name in kernel_names() if name != "reference"]
    return [name for name in names if get_kernel(name).skips_zeros and device in get_kernel(name).devices]


def specs(small: bool, device: str) -> Iterator[tuple[LayerSpec, tuple[int, ...]]]:
    """Layers, and the shape of an input of each; those of single elements come first."""
    for pattern, dtype in itertools.product(map(Pattern.parse, PATTERNS), DTYPES):
        for rows, width, tokens in SMALL_LINEARS if small else LINEARS:
            yield LayerSpec("linear", (rows, width), pattern, dtype, device), (tokens, width)
        for rows, channels, window, stride, batch, size in SMALL_CONVS if small else CONVS:
            shape, padding = (rows, channels, window, window), (window // 2,) * 2
            spec = LayerSpec("conv2d", shape, pattern, dtype, device, (stride, stride), padding)
            yield spec, (batch, channels, size, size)


def one_hot_error(kernel: Kernel, spec: LayerSpec) -> str | None:
    """Weights of one element each (v rows of them), against x = 1, 2, 3, ...: which element went where."""
    rows, width = spec.weight_shape
    x = (torch.arange(width, device=spec.device) % 256 + 1).to(spec.dtype).expand(16, width)
    for step in range(16):
        column = step * 37 % width
        first = step * 5 % rows // spec.pattern.v * spec.pattern.v
        weight = torch.zeros(rows, width, dtype=spec.dtype, device=spec.device)
        weight[first : first + spec.pattern.v, column] = 1
        out = kernel.linear(x, *kernel.pack(weight, spec), spec, Epilogue())
        if not torch.equal(out, x @ weight.T):
            wrong = (out != x @ weight.T).nonzero()[0].tolist()
            return f"weight[{first}, {column}] = 1 is wrong at out{wrong}"
    return None


def random_error(kernel: Kernel, spec: LayerSpec, shape: tuple[int, ...], activation: str) -> float:
    """Relative error of one layer with bias, activation and residual; NaN if an element was not written."""
    generator = torch.Generator(spec.device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=spec.device).to(spec.dtype)

    fan_in = spec.weight_shape[1] * (spec.weight_shape[2] ** 2 if spec.op == "conv2d" else 1)
    weight, x, bias = random(*spec.weight_shape) / fan_in**0.5, random(*shape), random(spec.weight_shape[0])
    masked = weight.double() * magnitude_mask(weight, spec.pattern)
    packed = kernel.pack(weight, spec)
    unpacked = kernel.unpack(*packed, spec).double()
    if kernel.exact and not torch.equal(unpacked, masked):
        return float("inf")
    if (unpacked - masked).norm() > ROUNDED_TOLERANCE * masked.norm():
        return float("inf")
    if spec.op == "linear":
        product, run = F.linear(x.double(), masked, bias.double()), kernel.linear
    else:
        x = x.contiguous(memory_format=torch.channels_last)
        product = F.conv2d(x.double(), masked, bias.double(), spec.stride, spec.padding)
        run = kernel.conv
    residual = random(*product.shape)
    expected = _ACTIVATIONS[activation](product) + residual.double()
    with poisoned():
        out = run(x, *packed, spec, Epilogue(bias, activation, residual))
    again = run(x, *packed, spec, Epilogue(bias, activation, residual))
    if not torch.equal(out, again):
        return float("nan")  # a race
    return float((out.double() - expected).norm() / expected.norm())


def checks(names: list[str], device: str = "cuda", small: bool = False) -> Iterator[Record]:
    """One record a kernel and layer: ``ok`` and why not. A kernel that refuses everything is recorded once."""
    for name in names:
        kernel, taken, reason = get_kernel(name), 0, ""
        activations = itertools.cycle(_ACTIVATIONS)
        for spec, shape in specs(small, device):
            refusal = kernel.refusal(spec)
            if refusal is not None:
                reason = refusal
                continue
            taken += 1
            yield check(name, kernel, spec, shape, next(activations))
        if not taken:
            yield {"kernel": name, "ok": None, "why": reason}


def isolated_checks(clock: Clock, names: list[str], command: list[str]) -> Iterator[Record]:
    """The checks of each kernel in a process of its own, all at once.

    One bad address ends the CUDA context of its process, and with it every kernel that runs there afterwards.

    Args:
        command: the program; it takes ``--only own-checks --kernels NAME --minutes M --out FOLDER`` and writes a JSON
            file into the folder as it goes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        processes = {}
        for name in names:
            limit = f"{max(clock.left(), 1) / 60:.3f}"
            arguments = ["--only", "own-checks", "--kernels", name, "--minutes", limit, "--out", f"{scratch}/{name}"]
            processes[name] = subprocess.Popen(
                [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for name, process in processes.items():
            try:
                output, _ = process.communicate(timeout=max(clock.left(), 1))
                ended = process.returncode in (0, 1)
                why = f"status {process.returncode}: " + " ".join(output.split())[-300:]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                ended, why = True, ""  # whatever it wrote counts
            for path in Path(scratch, name).glob("*.json"):
                for section in json.loads(path.read_text())["sections"]:
                    yield from section["records"]
            if not ended:
                yield {"kernel": name, "ok": False, "why": f"its process broke off, {why}"}


def check(name: str, kernel: Kernel, spec: LayerSpec, shape: tuple[int, ...], activation: str) -> Record:
    """One layer through one kernel."""
    record = {
        "kernel": name,
        "layer": f"{spec.op} {'x'.join(map(str, spec.weight_shape))} {spec.pattern} {dtype_name(spec.dtype)}",
        "input": "x".join(map(str, shape)),
        "activation": activation,
    }
    try:
        tell_apart = kernel.exact and spec.op == "linear" and max(spec.weight_shape) <= 512
        wrong = one_hot_error(kernel, spec) if tell_apart else None
        if wrong is not None:
            return record | {"ok": False, "why": wrong}
        error = random_error(kernel, spec, shape, activation)
    except Exception as failure:  # a kernel that raises is a wrong kernel, and the next one must still be checked
        return record | {"ok": False, "why": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
    ok = error < (TOLERANCE[spec.dtype] if kernel.exact else ROUNDED_TOLERANCE)
    return record | {"ok": ok, "error": error, "why": "" if ok else f"relative error {error:.1e}"}


def sanitizer(clock: Clock, names: list[str], command: list[str]) -> Iterator[Record]:
    """The small checks again, under compute-sanitizer: out-of-bounds accesses, then races in shared memory.

    Args:
        command: the program; it takes ``--only small-checks --kernels NAMES``.
    """
    program = which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    if not names:
        raise Skipped("no kernel is left")
    # Without torch's own pool of memory, each tensor is an allocation whose ends the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        under = [program, "--tool", tool, "--error-exitcode", "9", *command]
        limit = clock.left() if tool == "racecheck" else clock.left() * 0.6
        try:
            done = subprocess.run(
                [*under, "--only", "small-checks", "--kernels", ",".join(names)],
                capture_output=True,
                text=True,
                timeout=max(limit, 1),
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            yield {"tool": tool, "ok": None, "why": f"not done after {limit:.0f} s"}
            continue
        tail = (done.stdout + done.stderr).strip().splitlines()[-20:]
        yield {"tool": tool, "ok": done.returncode == 0, "why": "" if done.returncode == 0 else "\n".join(tail)}
