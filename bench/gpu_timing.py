"""Times of every GPU kernel against dense, in turn, as replays of CUDA graphs."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_checks import sparse_kernels
from gpu_runner import Clock, Record, Skipped
from gpu_shapes import BATCHES, CONVS, GRID, GRID_BATCH, GRID_HEADS, GRID_WIDTH, LINEARS, Conv, Linear
from torch import Tensor

from sparsedm_compile.cuda_graph import capture
from sparsedm_compile.kernels import choice, get_kernel, kernel_names
from sparsedm_compile.kernels.registry import Epilogue, LayerSpec
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.timing import median_ratio, paired_times

# The first pattern that a kernel takes is the one that it is timed at.
PATTERNS = ("2:4", "2:4v64")
_CALLS = 10  # a graph, so that what a replay costs on the host does not count
_SECONDS = 0.15


def race(candidates: dict[str, Callable[[], Tensor]], seconds: float = _SECONDS) -> dict[str, Record]:
    """Microseconds a call of each candidate and its gain over ``"dense"``, or why it did not run."""
    ready, results = {}, {}
    for name, run in candidates.items():
        try:
            ready[name] = capture(run, _CALLS)
        except Exception as error:
            results[name] = {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    times = paired_times(ready, seconds=seconds, synchronize=torch.cuda.synchronize)
    for name in ready:
        gain, spread = median_ratio(times["dense"], times[name]) if "dense" in times else (math.nan, math.nan)
        results[name] = {
            "us": median(times[name]) / _CALLS * 1e6,
            "gain": gain,
            "iqr": spread,
            "rounds": len(times[name]),
        }
    return results


def layer_candidates(
    spec_of: Callable[[str], LayerSpec], x: Tensor, banned: set[str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Dense and every kernel that takes the layer, with bias; and the reasons of those that do not."""
    spec = spec_of("2:4")
    weight = torch.randn(spec.weight_shape, device=x.device, dtype=x.dtype) / math.sqrt(
        math.prod(spec.weight_shape[1:])
    )
    bias = torch.randn(spec.weight_shape[0], device=x.device, dtype=x.dtype)
    if spec.op == "linear":
        candidates = {"dense": lambda: F.linear(x, weight, bias)}
    else:
        dense = weight.contiguous(memory_format=torch.channels_last)
        candidates = {"dense": lambda: F.conv2d(x, dense, bias, spec.stride, spec.padding)}
    reasons: dict[str, str | None] = {}
    for name in sparse_kernels(x.device.type):
        kernel = get_kernel(name)
        for s in map(spec_of, PATTERNS):
            reasons[name] = kernel.refusal(s)
            if reasons[name] is not None:
                continue
            if name in banned:
                reasons[name] = "not shown to be right"
                break
            try:
                packed = kernel.pack(weight, s)
            except Exception as error:
                reasons[name] = f"{type(error).__name__}: {error}"
                break
            run = kernel.linear if s.op == "linear" else kernel.conv
            candidates[f"{name} {s.pattern}"] = lambda run=run, p=packed, s=s: run(x, *p, s, Epilogue(bias))
            break
    return candidates, {name: why for name, why in reasons.items() if why}


def linear_spec(layer: Linear) -> Callable[[str], LayerSpec]:
    """The layer at a pattern."""
    return lambda p: LayerSpec("linear", (layer.rows, layer.width), Pattern.parse(p), torch.bfloat16, "cuda")


def conv_spec(layer: Conv) -> Callable[[str], LayerSpec]:
    """The layer at a pattern."""
    shape = (layer.rows, layer.channels, layer.window, layer.window)
    stride, padding = (layer.stride,) * 2, (layer.window // 2,) * 2
    return lambda p: LayerSpec("conv2d", shape, Pattern.parse(p), torch.bfloat16, "cuda", stride, padding)


def linears(banned: set[str]) -> Iterator[Record]:
    """Every linear layer at every batch, the largest batch first."""
    for batch in BATCHES:
        for layer in LINEARS:
            x = torch.randn(batch * layer.tokens, layer.width, device="cuda", dtype=torch.bfloat16)
            candidates, reasons = layer_candidates(linear_spec(layer), x, banned)
            yield {"layer": layer.name, "batch": batch, "times": race(candidates), "not run": reasons}


def convs(banned: set[str]) -> Iterator[Record]:
    """Every convolution, channels last, at every batch."""
    for batch in BATCHES:
        for layer in CONVS:
            x = torch.randn(batch, layer.channels, layer.size, layer.size, device="cuda", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last)
            candidates, reasons = layer_candidates(conv_spec(layer), x, banned)
            yield {"layer": layer.name, "batch": batch, "times": race(candidates), "not run": reasons}


def tiles(banned: set[str]) -> Iterator[Record]:
    """Every tile of the CUDA kernel, for the efficiencies in kernels/cuda/tiles.py."""
    from sparsedm_compile.kernels.cuda import kernel as cuda
    from sparsedm_compile.kernels.cuda.tiles import TILES

    kernel = get_kernel("cuda")
    for layer in (LINEARS[0], LINEARS[10], LINEARS[18]):
        spec = linear_spec(layer)("2:4")
        refusal = "not shown to be right" if "cuda" in banned else kernel.refusal(spec)
        if refusal is not None:
            raise Skipped(f"cuda: {refusal}")
        for batch in BATCHES:
            x = torch.randn(batch * layer.tokens, layer.width, device="cuda", dtype=torch.bfloat16)
            chip = cuda.chip(x.device)
            limit = chip.shared_limit
            packed = kernel.pack(torch.randn(spec.weight_shape, device="cuda", dtype=x.dtype), spec)

            def forced(tile, x=x, packed=packed, spec=spec, limit=limit):
                plan = (cuda.program(spec, tile, limit), tile)
                with patch.object(cuda, "_plan", lambda *_: plan):
                    return kernel.linear(x, *packed, spec, Epilogue())

            fitting = [t for t in TILES if t.arch in (None, chip.arch) and t.stages(limit)]
            candidates = {_name(t): lambda t=t: forced(t) for t in fitting}
            chosen = cuda._plan(spec, x.shape[0], x.device)[1]
            yield {
                "layer": layer.name,
                "batch": batch,
                "chosen": _name(chosen),
                "times": race(candidates),
            }


def _name(tile) -> str:
    return f"{tile.source.removesuffix('.cu')} {tile.rows}x{tile.tokens}"


def grid(banned: set[str]) -> Iterator[Record]:
    """SparseDM's 12 cells: one transformer block, each linear by its own fastest kernel, dense among them."""
    for patch_size, ratio in GRID:
        yield {"patch": patch_size, "mlp ratio": ratio} | _cell(patch_size, ratio, banned)
        torch.cuda.empty_cache()


def _cell(patch_size: int, ratio: int, banned: set[str]) -> Record:
    dim, dtype = GRID_WIDTH, torch.float16
    tokens = (32 // patch_size) ** 2 + 1
    x = torch.randn(GRID_BATCH, tokens, dim, device="cuda", dtype=dtype)
    shapes = {"qkv": (3 * dim, dim), "proj": (dim, dim), "fc1": (ratio * dim, dim), "fc2": (dim, ratio * dim)}
    dense, sparse, picked = {}, {}, {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, device="cuda", dtype=dtype) / shape[1] ** 0.5
        y = x if shape[1] == dim else torch.randn(GRID_BATCH, tokens, shape[1], device="cuda", dtype=dtype)
        masked = mask_out(weight, "2:4")
        dense[name] = lambda y, w=masked: F.linear(y, w)
        candidates = {"dense": lambda y=y, w=masked: F.linear(y, w)}
        runs = {"dense": dense[name]}
        for kernel_name in sparse_kernels("cuda"):
            kernel = get_kernel(kernel_name)
            for pattern in PATTERNS:
                spec = LayerSpec("linear", shape, Pattern.parse(pattern), dtype, "cuda")
                if not kernel.exact or kernel_name in banned or kernel.refusal(spec) is not None:
                    continue
                label, packed = f"{kernel_name} {pattern}", kernel.pack(weight, spec)
                runs[label] = lambda y, k=kernel, p=packed, s=spec: k.linear(y, *p, s, Epilogue())
                candidates[label] = lambda run=runs[label], y=y: run(y)
                break
        times = race(candidates, seconds=0.1)
        picked[name] = max((n for n in times if "gain" in times[n]), key=lambda n: times[n]["gain"])
        sparse[name] = runs[picked[name]]

    def block(layers: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        qkv = layers["qkv"](F.layer_norm(x, (dim,))).reshape(GRID_BATCH, tokens, 3, GRID_HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        y = x + layers["proj"](attention)
        return y + layers["fc2"](F.gelu(layers["fc1"](F.layer_norm(y, (dim,)))))

    return {"kernels": picked, "times": race({"dense": lambda: block(dense), "sparse": lambda: block(sparse)})}


_CONFIGS = Path(__file__).parent / "configs"
#: name -> (model, its config, batch); diffusers classes need that package
MODELS = {
    "U-ViT-S/2": ("uvit-s/2", None, 64),
    "U-ViT-L/2": ("uvit-l/2", None, 64),
    "DiT-XL/2": ("diffusers:DiTTransformer2DModel", _CONFIGS / "dit-xl-2.json", 64),
    "DDPM UNet": ("diffusers:UNet2DModel", _CONFIGS / "ddpm-cifar10.json", 64),
    "SD 1.5 UNet": ("diffusers:UNet2DConditionModel", _CONFIGS / "sd-1.5-unet.json", 16),
}
# A compilation takes about so long; with less left, none is begun.
_COMPILATION = 30
# ‖out − masked dense in bf16‖ / its norm: both round after every layer, each in its own order.
_MODEL_TOLERANCE = 0.05


def models(clock: Clock, banned: set[str]) -> Iterator[Record]:
    """End to end, bf16: Inductor with max-autotune and CUDA graphs against the same through the backend."""
    allowed = [name for name in kernel_names() if name not in banned]
    for name, (source, config, batch) in MODELS.items():
        record, done = {"model": name, "batch": batch}, 0
        try:
            if clock.left() <= _COMPILATION:
                raise Skipped(f"{max(clock.left(), 0):.0f} s were left")
            with patch.object(choice, "kernel_names", lambda: allowed):
                for measured in _end_to_end(source, config, batch, clock):
                    yield record | measured
                    done += 1
        except Skipped as reason:
            yield from (record | {"pattern": p, "why": str(reason)} for p in PATTERNS[done:])
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            yield from (record | {"pattern": p, "why": why} for p in PATTERNS[done:])
        torch.cuda.empty_cache()


def _end_to_end(source: str, config: Path | None, batch: int, clock: Clock) -> Iterator[Record]:
    """One record a pattern; dense is compiled once."""
    from sparsedm_compile.backend import sparsedm
    from sparsedm_compile.explain import explain
    from sparsedm_compile.model_spec import load_model
    from sparsedm_compile.sparsify import sparsify

    torch._dynamo.reset()
    loaded = load_model(source, batch=batch, config=config)
    inputs, kwargs = _on_gpu(loaded.inputs), _on_gpu(loaded.kwargs)
    model = loaded.model.cuda().bfloat16()
    dense = torch.compile(model, mode="max-autotune")
    policy = "sparsedm" if source.startswith("uvit") else "default"
    for pattern in PATTERNS:
        if clock.left() <= _COMPILATION:
            raise Skipped(f"{max(clock.left(), 0):.0f} s were left")
        masked = copy.deepcopy(model)
        plan = sparsify(masked, pattern, policy=policy)
        sparse = torch.compile(masked, backend=sparsedm, mode="max-autotune")
        with torch.no_grad():
            expected = _first(masked(*inputs, **kwargs)).float()
            error = float((_first(sparse(*inputs, **kwargs)).float() - expected).norm() / expected.norm())
            times = paired_times(
                {
                    "dense": lambda: dense(*inputs, **kwargs),
                    "sparse": lambda run=sparse: run(*inputs, **kwargs),
                },
                seconds=3,
                synchronize=torch.cuda.synchronize,
            )
            kernels = Counter(layer.kernel for layer in explain(sparse, *inputs, **kwargs).layers)
        gain, spread = median_ratio(times["dense"], times["sparse"])
        yield {
            "pattern": pattern,
            "ms": {name: median(rounds) * 1e3 for name, rounds in times.items()},
            "gain": gain,
            "iqr": spread,
            "ok": error < _MODEL_TOLERANCE,
            "relative error to masked dense": error,
            "sparse layers": len(plan.patterns()),
            "kernels": dict(kernels),
        }


def _on_gpu(inputs):
    if isinstance(inputs, Tensor):
        return inputs.cuda().bfloat16() if inputs.is_floating_point() else inputs.cuda()
    if isinstance(inputs, dict):
        return {key: _on_gpu(value) for key, value in inputs.items()}
    return tuple(_on_gpu(value) for value in inputs) if isinstance(inputs, tuple) else inputs


def _first(out) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
