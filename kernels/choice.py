"""Choice of kernel: sparse against dense, timed in turn on tensors like the real ones, remembered on disk.

A clear verdict serves sizes near the one that it was measured at, so that a new batch size or resolution seldom costs a
measurement: see :func:`_is_clear`.
"""

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.cuda_graph import capture
from sparsedm_compile.kernels import get_kernel, kernel_names
from sparsedm_compile.kernels.registry import LayerSpec
from sparsedm_compile.kernels.verdicts import Verdict, VerdictStore
from sparsedm_compile.masked_weight import mask_out
from sparsedm_compile.timing import median_ratio, paired_times

_log = logging.getLogger(__name__)

# Seconds that the measurement of one layer may take; a model has five to thirty different layers.
_BUDGET = 0.25
# A kernel must beat plain dense by this much: a tie is not worth a second copy of the weight.
_MARGIN = 1.02
# Rounds whose median lies so far above their minimum were disturbed by other work. On two shared cores most rounds then
# last a whole scheduler tick (8 ms) whatever the kernel, and medians compare nothing: minima are compared instead, and
# the verdict is not remembered beyond the process.
_BUSY = 1.5
# On a GPU a round is so many calls in a row, as a model makes them: host and GPU work side by side, and the slower one
# counts. Timed call by call, what a launch costs the host (more through CuPy than in torch) would decide small layers.
_CALLS = 10
# A ratio so far from 1 is taken for granted at sizes near the one measured.
_CLEAR = 1.4
# Part of every verdict's key: what was timed. Those of earlier releases, on kernels alone or without the time of
# torch's own operator, are then not found.
_TIMED = "operators, torch's own told"
_NATIVE = "dense"
_REFERENCE = "reference"  # never a candidate: it unpacks at every call

_store = VerdictStore()
_lock = threading.RLock()


def choose(
    spec: LayerSpec, x: Tensor, has_bias: bool, forced: str = "auto", unusual: str = "", graphs: bool = False
) -> Verdict:
    """The kernel for this layer at this input, from a measurement at this size or, if there is one, at a like size.

    Args:
        spec: the layer; its pattern may be dense, then only dense kernels compete.
        x: an example input; sizes may be symbolic (their hints are used) and its values are never read.
        has_bias: whether the layer adds a bias.
        forced: ``"auto"``, ``"dense"`` or the name of a kernel.
        unusual: a reason that rules every kernel out.
        graphs: whether the layer will be replayed from a CUDA graph, where launches cost the host nothing.

    Returns:
        A verdict; ``"dense"`` wherever no kernel can run, whatever was forced. Never raises for a layer's sake.
    """
    if unusual:
        return Verdict(_NATIVE, unusual)
    if forced == _NATIVE:
        return Verdict(_NATIVE, "option kernel='dense'")
    if forced != "auto":
        refusal = get_kernel(forced).refusal(spec)
        if refusal is None:
            return Verdict(forced, f"option kernel={forced!r}")
        if not spec.pattern.is_dense:
            _log.warning("kernel %r cannot take %s: %s; dense instead", forced, spec, refusal)
        return Verdict(_NATIVE, f"kernel {forced!r} cannot take it: {refusal}")

    kernels = {name: get_kernel(name) for name in kernel_names() if name != _REFERENCE}
    names = [name for name, kernel in kernels.items() if kernel.exact and spec.device in kernel.devices]
    if not names:
        return Verdict(_NATIVE, f"no kernel runs on {spec.device}")
    refusals = {name: get_kernel(name).refusal(spec) for name in names}
    able = [name for name, refusal in refusals.items() if refusal is None]
    sparse = [name for name in able if get_kernel(name).skips_zeros]
    if not able:
        return Verdict(_NATIVE, _explain_refusals(refusals))
    flat = spec.op == "conv2d" and x.dim() == 3  # a conv1d, which runs as the conv2d of height 1
    if flat:
        x = x.contiguous().unsqueeze(2)
    shape = _measured_shape(x)
    if shape is None:
        return Verdict(_NATIVE, "a size of its input is unknown until it runs, so no kernel can be measured on it")
    memory_format = suggest_memory_format(x)
    threads = torch.get_num_threads()
    versions = {name: get_kernel(name).version for name in able}
    graphs = graphs and spec.device == "cuda"
    conditions = [word for word, holds in (("graphs", graphs), ("conv1d", flat)) if holds]
    sizes = _sizes(spec, shape)
    here, near = (
        repr((_TIMED, spec, size, memory_format, has_bias, threads, versions, *conditions))
        for size in (sizes, ("near", *map(_power_of_two, sizes)))
    )
    # One measurement at a time: two at once would time each other.
    with _lock:
        verdict = _store.get(here)
        if verdict is None:
            neighbour = _store.get(near)
            if neighbour is not None and _is_clear(neighbour):
                verdict = neighbour
            else:
                verdict = _measure(spec, shape, memory_format, has_bias, able, graphs, flat)
                _store.put(here, verdict)
                _store.put(near, verdict)
    if not sparse and not spec.pattern.is_dense:
        return replace(verdict, reason=_explain_refusals(refusals), sparse_seconds=None, ratio=None)
    return verdict


def _explain_refusals(refusals: dict[str, str | None]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in refusals.items() if why and get_kernel(name).skips_zeros)


def _measure(
    spec: LayerSpec,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    has_bias: bool,
    able: list[str],
    graphs: bool,
    flat: bool,
) -> Verdict:
    generator = torch.Generator(spec.device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=spec.device).to(spec.dtype)

    with torch.inference_mode(False), torch.no_grad():
        x = random(*shape).contiguous(memory_format=memory_format)
        if flat:
            x = x.squeeze(2)
        weight = random(*spec.weight_shape) / math.sqrt(math.prod(spec.weight_shape[1:]))
        bias = random(spec.weight_shape[0]) if has_bias else None
        masked = weight if spec.pattern.is_dense else mask_out(weight, str(spec.pattern))
        dense = masked.squeeze(2) if flat else masked
        constants = (str(spec.pattern), spec.weight_shape)
        if spec.op != "linear":
            constants += (spec.stride, spec.padding, spec.dilation, spec.groups)
        candidates: dict[str, Callable[[], Tensor]] = {_NATIVE: lambda: _native(x, dense, bias, spec)}
        for name in able:
            candidates[name] = partial(_operator(spec), x, *get_kernel(name).pack(weight, spec), name, *constants, bias)
        if spec.device == "cuda":
            rows = _in_rows(candidates, graphs)
            if _NATIVE not in rows:
                return Verdict(_NATIVE, "not even dense can be measured here", settled=False)
            able = [name for name in able if name in rows]
            times = paired_times(rows, seconds=_BUDGET, synchronize=torch.cuda.synchronize)
            times = {name: [seconds / _CALLS for seconds in rounds] for name, rounds in times.items()}
        else:
            times = paired_times(candidates, seconds=_BUDGET)
    busy = any(median(rounds) > _BUSY * min(rounds) for rounds in times.values())
    if busy:
        times = {name: [min(rounds)] for name, rounds in times.items()}
    seconds = {name: median(times[name]) for name in times}
    sparse = [name for name in able if get_kernel(name).skips_zeros]
    best_dense = min((name for name in times if name not in sparse), key=seconds.__getitem__)

    if best_dense != _NATIVE and median_ratio(times[_NATIVE], times[best_dense])[0] < _MARGIN:
        best_dense = _NATIVE
    at = "x".join(map(str, shape))
    native = seconds[_NATIVE]
    if not sparse:
        reason = f"fastest dense at {at}: {best_dense}"
        return Verdict(best_dense, reason, None, seconds[best_dense], None, not busy, shape, native)
    best = min(sparse, key=seconds.__getitem__)
    gain, _ = median_ratio(times[best_dense], times[best])
    winner = best if gain >= _MARGIN else best_dense
    reason = f"{gain:.2f}x the fastest dense ({best_dense}) at {at}" + (", on a busy machine" if busy else "")
    return Verdict(winner, reason, seconds[best], seconds[best_dense], gain, not busy, shape, native)


def _operator(spec: LayerSpec) -> Callable[..., Tensor]:
    """What a compiled model calls. Of a layer of some microseconds its own cost, 10 to 20 of them, is the larger part:
    measured without it, a conv1d network of 1 ms was found faster layer by layer and ran at 0.8x.
    """
    return torch.ops.sparsedm.linear.default if spec.op == "linear" else torch.ops.sparsedm.conv.default


def _in_rows(candidates: dict[str, Callable[[], Tensor]], graphs: bool) -> dict[str, Callable[[], object]]:
    """``_CALLS`` calls of each as one; without those that fail, which then take no part."""
    rows: dict[str, Callable[[], object]] = {}
    for name, run in candidates.items():
        try:
            run()
            rows[name] = capture(run, _CALLS) if graphs else partial(_row, run)
        except RuntimeError as error:
            _log.warning("kernel %r fails here and is not used: %s", name, error)
    return rows


def _row(run: Callable[[], Tensor]) -> None:
    for _ in range(_CALLS):
        run()


def _native(x: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    if spec.op == "linear":
        return F.linear(x, weight, bias)
    if spec.op == "conv2d" and x.dim() == 3:
        return F.conv1d(x, weight, bias, spec.stride[1:], spec.padding[1:], spec.dilation[1:], spec.groups)
    convolve = F.conv2d if spec.op == "conv2d" else F.conv3d
    return convolve(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def _measured_shape(x: Tensor) -> tuple[int, ...] | None:
    """The shape to measure at; None where a size has no hint (unbacked symbols)."""
    if not all(isinstance(size, int) or size.node.has_hint() for size in x.shape):
        return None
    return tuple(max(1, size if isinstance(size, int) else int(size.node.hint)) for size in x.shape)


def _sizes(spec: LayerSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What of an input's size the speed of a layer depends on: tokens; images and each extent of an image."""
    return (math.prod(shape[:-1]),) if spec.op == "linear" else (shape[0], *shape[2:])


def _power_of_two(size: int) -> int:
    """The nearest one: sizes that share it are near each other."""
    return 1 << round(math.log2(size))


def _is_clear(verdict: Verdict) -> bool:
    """Whether a verdict serves sizes near the one that it was measured at, so that they cost no measurement.

    Ratios of sparse to dense differ by up to a third between sizes of one power of two (more tokens than fill the last
    panel), so a close call is measured again at each size.
    """
    return verdict.ratio is None or not 1 / _CLEAR < verdict.ratio < _CLEAR
