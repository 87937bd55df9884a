"""The Triton kernels compiled for GPUs that are not here: no spills, shared memory that fits, tensor cores in use.

Cases differ in pattern, dtype and in what is fused. Every case on every tile that the autotuner may try on every chip
takes minutes: ``pytest -m slow``. Always run: all tiles of sm_90 and the widest of the others, the cases dealt out.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparsedm_compile.kernels.triton.packed import packed_kernel  # noqa: E402
from sparsedm_compile.kernels.triton.tiles import Tile, packed_tiles, position_bits, vector_tiles  # noqa: E402
from sparsedm_compile.kernels.triton.vector import vector_kernel  # noqa: E402
from sparsedm_compile.pattern import Pattern  # noqa: E402

# Bytes of shared memory that one block may have (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_OPCODE = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Binary:
    """Registers and stack of a thread (spilled registers go to the stack), shared bytes of a block, SASS opcodes."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter

    def count(self, opcode: str) -> int:
        return sum(count for full, count in self.opcodes.items() if (full + ".").startswith(opcode + "."))


def compile_for(capability: int, kernel, arguments: dict, tile: Tile, directory: Path) -> Binary:
    """Compile as a launch would: strings are Triton types, other values are compile-time constants.

    Pointers are 16-byte aligned, as torch's allocator gives them; ``"i32%16"`` is an integer that 16 divides.
    """
    arguments = arguments | tile.blocks
    types, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, str):
            types[name] = value.removesuffix("%16")
            if value.startswith("*") or value.endswith("%16"):
                attributes[position,] = [["tt.divisibility", 16]]
        else:
            types[name], constants[name] = "constexpr", value
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, stack = map(int, _RESOURCES.search(_run("cuobjdump", "-res-usage", cubin)).groups())
    opcodes = Counter(_OPCODE.findall(_run("nvdisasm", "-c", cubin)))
    return Binary(registers, stack, compiled.metadata.shared, opcodes)


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def vector_arguments(pattern: Pattern, dtype: str, window: int = 0, stride: int = 1, nhwc: bool = True) -> dict:
    """A linear layer with everything fused, or a convolution of this window with bias and SiLU."""
    conv = window > 0
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("values", "bias", "residual", "out")}
    sizes = dict.fromkeys(("rows", "HEIGHT", "WIDTH", "OUT_WIDTH", "PIXELS", "bucket"), "i32")
    layout = {"out_pixel": "i32%16", "out_channel": 1} if nhwc else {"out_pixel": 1, "out_channel": "i32%16"}
    side, padding = max(window, 1), window // 2
    return {
        "x_ptr": "*i32" if pattern.m == 2 else "*i64",
        "shift_ptr": "*i32",
        **pointers,
        **sizes,
        **layout,
        "N": "i32%16",
        "K8": "i32",  # of 320 channels it is 40: 16-byte copies may rest on nothing but the factor 8
        "out_image": "i32%16",
        "n": pattern.n,
        "m": pattern.m,
        "V": pattern.v,
        "KERNEL_H": side,
        "KERNEL_W": side,
        "STRIDE_H": stride,
        "STRIDE_W": stride,
        "PAD_H": padding,
        "PAD_W": padding,
        "DILATION_H": 1,
        "DILATION_W": 1,
        "CONV": conv,
        "ACTIVATION": 3 if conv else 1,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": not conv,
    }


VECTOR_CASES = {
    "2:4v64 linear bf16": vector_arguments(Pattern(2, 4, 64), "bf16"),
    "2:4v64 3x3 fp16": vector_arguments(Pattern(2, 4, 64), "fp16", 3),
    "1:4v64 3x3 stride 2 bf16": vector_arguments(Pattern(1, 4, 64), "bf16", 3, 2),
    "2:4v128 1x1 nchw fp16": vector_arguments(Pattern(2, 4, 128), "fp16", 1, nhwc=False),
    "1:8v64 linear bf16": vector_arguments(Pattern(1, 8, 64), "bf16"),
}
PACKED_CASES = {
    "2:4": (Pattern(2, 4), "bf16"),
    "1:4": (Pattern(1, 4), "fp16"),
    "4:8": (Pattern(4, 8), "bf16"),
    "1:16v4": (Pattern(1, 16, 4), "fp16"),
}


def packed_arguments(pattern: Pattern, dtype: str) -> dict:
    return {
        **{f"{name}_ptr": f"*{dtype}" for name in ("x", "values", "bias", "residual", "out")},
        "index_ptr": "*i32",
        "rows": "i32",
        "N": "i32%16",
        "K": "i32%16",
        "GROUPS8": "i32",
        "bucket": "i32",
        "n": pattern.n,
        "m": pattern.m,
        "M_PADDED": 1 << (pattern.m - 1).bit_length(),
        "V": pattern.v,
        "BITS": position_bits(pattern),
        "ACTIVATION": 3,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
    }


def vector_matrix() -> list:
    """Every case on every tile of every chip; one case of a tile is fast, for sm_90 and for the widest tiles."""
    chosen = []
    for dealt, capability in enumerate(SHARED_LIMIT):
        for case, arguments in VECTOR_CASES.items():
            pattern = Pattern(arguments["n"], arguments["m"], arguments["V"])
            for position, tile in enumerate(
                vector_tiles(capability // 10, SHARED_LIMIT[capability], pattern, 1 << 20, arguments["CONV"])
            ):
                name = f"sm_{capability}-{case}-{tile.rows}x{tile.channels}x{tile.depth}"
                fast = list(VECTOR_CASES).index(case) == (position + dealt) % len(VECTOR_CASES)
                marks = () if fast and (capability == 90 or position == 0) else pytest.mark.slow
                chosen.append(pytest.param(capability, arguments, tile, id=name, marks=marks))
    return chosen


def packed_matrix() -> list:
    chosen = []
    for at, capability in enumerate(SHARED_LIMIT):
        for number, (case, (pattern, dtype)) in enumerate(PACKED_CASES.items()):
            for rows in (1, 64):
                for position, tile in enumerate(packed_tiles(SHARED_LIMIT[capability], pattern, rows, 2)):
                    name = f"sm_{capability}-{case}-{tile.rows}x{tile.channels}x{tile.depth}"
                    fast = rows == 1 and number == at % len(PACKED_CASES) and position in (0, 1)
                    marks = () if fast else pytest.mark.slow
                    arguments = packed_arguments(pattern, dtype)
                    chosen.append(pytest.param(capability, arguments, tile, pattern, id=name, marks=marks))
    return chosen


def assert_clean(binary: Binary, capability: int, tile: Tile, step_bytes: int) -> None:
    """No spills; fits; all of a step's operands come by asynchronous copies, and nothing is copied twice."""
    assert binary.stack == 0, f"{binary.stack} bytes of registers spilled"
    assert binary.count("LDL") + binary.count("STL") == 0
    assert (tile.stages - 1) * step_bytes <= binary.shared <= SHARED_LIMIT[capability]
    widths = {"LDGSTS.E.128": 16, "LDGSTS.E.BYPASS.128": 16, "LDGSTS.E.64": 8, "LDGSTS.E": 4}
    copies = {opcode: count for opcode, count in binary.opcodes.items() if opcode.startswith("LDGSTS")}
    copied = sum(widths[opcode] * count for opcode, count in copies.items()) * 32 * tile.warps
    # The code copies stages - 1 times before the loop and once in it; for sm_100 one iteration is peeled off the loop.
    assert copied <= 1.5 * (tile.stages + (capability == 100)) * step_bytes
    assert binary.count("SHFL") == 0  # nothing moves between threads


@pytest.mark.parametrize(("capability", "arguments", "tile"), vector_matrix())
def test_vector_kernel(capability, arguments, tile, tmp_path, record_property):
    binary = compile_for(capability, vector_kernel, arguments, tile, tmp_path)
    record_property("binary", f"{binary.registers} registers, {binary.shared} B shared")
    n, m = arguments["n"], arguments["m"]
    assert_clean(binary, capability, tile, 2 * tile.depth * tile.rows + 2 * tile.depth * n // m * tile.channels)
    assert binary.count(TENSOR_CORE[capability]) > 0
    if capability == 90:
        # wgmma takes 64 rows and 16 inputs, and here a whole strip of channels: more would be smaller, slower ones.
        strips = tile.channels // min(arguments["V"], 64)
        row_blocks = tile.rows // 64 // (tile.warps // 4)
        assert binary.count("HGMMA") == strips * (tile.depth // m * n // 16) * row_blocks
    assert binary.count("LDGSTS.E.BYPASS.128") > 0


@pytest.mark.parametrize(("capability", "arguments", "tile", "pattern"), packed_matrix())
def test_packed_kernel(capability, arguments, tile, pattern, tmp_path, record_property):
    binary = compile_for(capability, packed_kernel, arguments, tile, tmp_path)
    record_property("binary", f"{binary.registers} registers, {binary.shared} B shared")
    assert_clean(binary, capability, tile, 2 * tile.depth * (tile.rows + tile.channels * pattern.n // pattern.m))
    assert binary.count("HMMA") + binary.count("HGMMA") + binary.count("UTCHMMA") > 0
    assert binary.count("LDGSTS.E.BYPASS.128") > 0
