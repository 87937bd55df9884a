"""The CUDA kernels compiled for every chip, without one: registers, spills, shared memory, instructions.

Every tile on every chip: ``pytest -m slow``.
"""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparsedm_compile.kernels.cuda.build import compile_cubin, cubin_path
from sparsedm_compile.kernels.cuda.kernel import program
from sparsedm_compile.kernels.cuda.tiles import TILES, Tile, choose_tile
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.pattern import Pattern

# Shared memory that one block may use, in KB: CUDA C++ programming guide, "technical specifications per compute
# capability".
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90a": 227, "sm_120": 99}


def tool(name):
    """cuobjdump and nvdisasm come with the CUDA toolkit, or inside Triton."""
    triton = find_spec("triton")
    if triton is not None:
        bundled = Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin", name)
        if bundled.exists():
            return str(bundled)
    return shutil.which(name)


needs_nvrtc = pytest.mark.skipif(find_spec("cupy") is None, reason="needs CuPy's NVRTC")
needs_tools = pytest.mark.skipif(not (tool("cuobjdump") and tool("nvdisasm")), reason="needs cuobjdump and nvdisasm")


def spec(op, dtype=torch.bfloat16):
    shape = (320, 320) if op == "linear" else (320, 320, 3, 3)
    padding = (0, 0) if op == "linear" else (1, 1)
    return LayerSpec(op, shape, Pattern(2, 4), dtype, "cuda", padding=padding)


def inspect(cubin, path):
    path.write_bytes(cubin)
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], check=True, capture_output=True, text=True).stdout
    sass = subprocess.run([tool("nvdisasm"), "-c", path], check=True, capture_output=True, text=True).stdout
    return {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, sass


def matrix():
    """Every tile that may be chosen on a chip, for both operators; fast are all of wgmma.cu and, of mma.cu, one a chip
    and operator, dealt out so that each tile is among them."""
    chosen = []
    for at, (arch, limit) in enumerate(SHARED.items()):
        fitting = [tile for tile in TILES if tile.arch in (None, arch) and tile.stages(limit * 1024)]
        for turn, op in enumerate(("linear", "conv2d")):
            dealt = [tile for tile in fitting if tile.source == "mma.cu"]
            fast = [dealt[(at + turn) % len(dealt)], *(tile for tile in fitting if tile.source == "wgmma.cu")]
            for tile in fitting:
                name = f"{arch}-{op}-{tile.source[:-3]}-{tile.rows}x{tile.tokens}"
                marks = () if tile in fast else pytest.mark.slow
                chosen.append(pytest.param(arch, tile, op, id=name, marks=marks))
    return chosen


@needs_nvrtc
@needs_tools
@pytest.mark.parametrize(("arch", "tile", "op"), matrix())
def test_compiles_without_spills(arch, tile, op, tmp_path):
    limit = SHARED[arch] * 1024
    variant = program(spec(op), tile, limit)
    usage, sass = inspect(compile_cubin(variant.source, arch, variant.defines), tmp_path / "kernel.cubin")
    assert usage["STACK"] == 0
    assert usage["LOCAL"] == 0
    assert not re.search(r"\b(LDL|STL)\b", sass)
    assert usage["REG"] * tile.threads * tile.blocks <= 65536
    assert variant.shared + usage["SHARED"] <= limit + 1024  # the system's kilobyte is not the block's
    assert variant.shared >= tile.threads // tile.group * 32 * (tile.warp_rows + 4) * 4, (
        "the epilogue turns its tiles in it"
    )
    # by the copy engine: weights as they were packed, activations through a tensor map; else by asynchronous copies
    engine = tile.source == "wgmma.cu"
    assert ("UBLKCP" in sass) == engine
    assert ("UTMALDG.2D" in sass) == (engine and op == "linear")
    assert ("LDGSTS.E.BYPASS.128" in sass) != (engine and op == "linear")
    # two instructions of depth 32 a step
    if tile.source == "wgmma.cu":
        assert len(re.findall(r"HGMMA\.SP\.64x128x32\.F32\.BF16", sass)) == 2 * 2 * (tile.tokens // 128)
        # one wait a step and one behind the last: more would be ptxas serializing what should overlap
        assert len(re.findall(r"WARPGROUP\.DEPBAR", sass)) == 3
    else:
        assert len(re.findall(r"HMMA\.SP\.\S+\.F32\.BF16", sass)) == 2 * tile.warp_rows // 16 * tile.warp_tokens // 8
        assert "LDSM.16.M88.4" in sass


@needs_nvrtc
@needs_tools
def test_float16_has_its_own_instruction(tmp_path):
    variant = program(spec("linear", torch.float16), TILES[-1], 99 * 1024)
    _, sass = inspect(compile_cubin(variant.source, "sm_80", variant.defines), tmp_path / "kernel.cubin")
    assert "HMMA.SP" in sass
    assert "BF16" not in sass


@needs_nvrtc
def test_compiles_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    cubin_path.cache_clear()
    variant = program(spec("linear"), TILES[-1], 99 * 1024)
    path = cubin_path(variant.source, "sm_80", variant.defines)
    assert path.read_bytes()[:4] == b"\x7fELF"
    cubin_path.cache_clear()
    path.write_bytes(b"kept")
    assert cubin_path(variant.source, "sm_80", variant.defines).read_bytes() == b"kept"
    assert cubin_path(variant.source, "sm_90a", variant.defines) != path
    cubin_path.cache_clear()


@needs_nvrtc
def test_an_unwritable_cache_costs_a_compilation(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path / "file"))
    cubin_path.cache_clear()
    variant = program(spec("linear"), TILES[-1], 99 * 1024)
    assert cubin_path(variant.source, "sm_80", variant.defines).exists()
    assert "not kept" in caplog.text
    cubin_path.cache_clear()


@needs_nvrtc
def test_a_compilation_error_shows_the_log():
    with pytest.raises(RuntimeError, match=r"cannot compile mma.cu for sm_80(.|\n)*TILE_M"):
        compile_cubin("mma.cu", "sm_80", ())


def test_tiles_suit_the_shape_and_the_chip():
    def chosen(rows, tokens, arch, multiprocessors):
        tile = choose_tile(rows, tokens, arch, multiprocessors, SHARED[arch] * 1024)
        return tile.source, tile.rows, tile.tokens

    assert chosen(4096, 65536, "sm_90a", 132) == ("wgmma.cu", 128, 256)
    assert chosen(512, 257, "sm_90a", 132)[1:] == (64, 64)
    assert chosen(4096, 65536, "sm_80", 108) == ("mma.cu", 128, 256)
    assert chosen(4096, 65536, "sm_89", 128) == ("mma.cu", 128, 128)  # the largest does not fit


def test_stages_fill_what_the_chip_has():
    tile = Tile(128, 128, 64, 64, blocks=2, efficiency=1.0)
    assert tile.stage_bytes == 128 * 32 * 2 + 128 * 64 // 8 + 128 * 64 * 2
    assert [tile.stages(limit * 1024) for limit in SHARED.values()] == [3, 3, 4, 3]
    assert tile.stages(48 * 1024) == 0
    with pytest.raises(ValueError, match="no tile fits into 1000 bytes"):
        choose_tile(64, 64, "sm_80", 1, 1000)
