"""Random layers on random inputs, through every kernel that runs here, against a float64 product with the naive mask.

A case is named by its number, which is also its seed. ``pytest tests/kernels/test_fuzz.py -m ""`` runs all thousand.
"""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.kernels import Epilogue, Kernel, LayerSpec, get_kernel, kernel_names
from sparsedm_compile.kernels.cpu.naive import epilogue_naive
from sparsedm_compile.kernels.registry import with_height
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

CASES, FEW = 1000, 100
PATTERNS = ["2:4", "1:4", "4:8", "1:2", "2:3", "5:7", "1:32", "31:32", "13:29"]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["none", "gelu", "gelu_tanh", "silu"]


@dataclass
class Case:
    spec: LayerSpec
    x: Tensor
    weight: Tensor
    epilogue: Epilogue
    threads: int

    def __str__(self) -> str:
        x, e = self.x, self.epilogue
        return f"{self.spec}, x {tuple(x.shape)} of strides {x.stride()}, {e.activation}, {self.threads} threads"


class Draw(random.Random):
    """Random numbers and tensors, all from one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(dtype)

    def few(self, most: int) -> int:
        """Of 1 to ``most``, small numbers more often."""
        return self.randint(1, self.randint(1, max(1, most)))

    def strided(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape in one of the layouts that views give."""
        rank = len(shape)
        match self.choice(["contiguous", "permuted", "stepped", "sliced", "expanded", "channels_last"]):
            case "permuted":
                order = self.sample(range(rank), rank)
                return self.normal(tuple(shape[d] for d in order), dtype).permute(_inverse(order))
            case "stepped":
                steps = [self.randint(1, 3) for _ in shape]
                whole = self.normal(tuple(size * step for size, step in zip(shape, steps, strict=True)), dtype)
                return whole[tuple(slice(None, None, step) for step in steps)]
            case "sliced":
                before = [self.randint(0, 2) for _ in shape]
                whole = self.normal(
                    tuple(s + b + self.randint(0, 2) for s, b in zip(shape, before, strict=True)), dtype
                )
                return whole[tuple(slice(b, b + s) for s, b in zip(shape, before, strict=True))]
            case "expanded" if rank:
                kept = self.randrange(rank)
                return self.normal(tuple(s if d == kept else 1 for d, s in enumerate(shape)), dtype).expand(shape)
            case "channels_last" if rank > 2:
                return self.normal((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1)
        return self.normal(shape, dtype)

    def epilogue(self, channels: int, out_shape: tuple[int, ...], dtype: torch.dtype) -> Epilogue:
        return Epilogue(
            bias=self.strided((channels,), dtype) if self.random() < 0.5 else None,
            activation=self.choice(ACTIVATIONS),
            residual=self.strided(out_shape, dtype) if self.random() < 0.4 else None,
        )


def _inverse(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def draw_case(seed: int) -> Case:
    draw = Draw(seed)
    pattern = Pattern.parse(draw.choice(PATTERNS) + draw.choice(["", "", "v2", "v4", "v8"]))
    dtype = draw.choice(DTYPES)
    return (draw_linear if draw.random() < 0.5 else draw_conv)(draw, pattern, dtype)


def draw_linear(draw: Draw, pattern: Pattern, dtype: torch.dtype) -> Case:
    # Beyond 128 output channels and 64 inputs, work is cut into units and blocks.
    gated = draw.random() < 0.1
    out = 256 * draw.few(3) if gated else pattern.v * draw.few(200 // pattern.v)
    width = pattern.m * draw.few(150 // pattern.m)
    lead = [draw.few(40) for _ in range(draw.randint(0, 3))]
    if lead and draw.random() < 0.1:
        lead[draw.randrange(len(lead))] = 0
    x, weight = draw.strided((*lead, width), dtype), draw.strided((out, width), dtype)
    epilogue = draw.epilogue(out, (*lead, out // 2 if gated else out), dtype)
    if gated:
        epilogue = replace(epilogue, activation="geglu")
    return Case(LayerSpec("linear", (out, width), pattern, dtype), x, weight, epilogue, draw.few(3))


def draw_conv(draw: Draw, pattern: Pattern, dtype: torch.dtype) -> Case:
    dims = draw.choice([1, 2, 2, 3])
    groups = 2 if draw.random() < 0.1 else 1
    out, width = pattern.v * draw.few(40 // pattern.v) * groups, pattern.m * draw.few(40 // pattern.m)
    kernel = [draw.few(5 if dims < 3 else 3) for _ in range(dims)]
    stride, dilation = ([draw.few(3) for _ in range(dims)] for _ in range(2))
    padding = [draw.randint(0, 3 if dims < 3 else 2) for _ in range(dims)]
    batch = 0 if draw.random() < 0.05 else draw.few(3)
    reach = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [low + draw.few({1: 100, 2: 24, 3: 9}[dims]) - 1 for low in reach]
    x = draw.strided((batch, width * groups, *size), dtype)
    weight = draw.strided((out, width, *kernel), dtype)
    shape, *window = with_height(weight.shape, stride, padding, dilation)
    spec = LayerSpec(f"conv{len(shape) - 2}d", shape, pattern, dtype, "cpu", *window, groups)
    case = Case(spec, x, weight, Epilogue(), draw.few(3))
    case.epilogue = draw.epilogue(out, tuple(dense(case.x, weight, spec).shape), dtype)
    return case


def dense(x: Tensor, weight: Tensor, spec: LayerSpec) -> Tensor:
    if spec.op == "linear":
        return F.linear(x, weight)
    dims = x.dim() - 2
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return conv(x, weight, None, spec.stride[-dims:], spec.padding[-dims:], spec.dilation[-dims:], spec.groups)


#: The steepest slope of an activation, of GELU at 1.41; SiLU's is 1.10.
SLOPE = 1.13
#: A sum of any number of terms, in the units of :func:`summed`: what all thousand cases keep to, as signs mix.
MOST_SUMMED = 8


def summed(spec: LayerSpec) -> float:
    """Rounding error of one output's float32 sum, in units of float32's epsilon times the sum of magnitudes.

    Of ``n`` kept terms each goes through ``n`` roundings at the most, of half an epsilon, in whatever order they are
    added (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); zeros are added without any. Roundings
    go up as often as down, so that of many only the square root counts (Higham and Mary, A New Approach to
    Probabilistic Rounding Error Analysis, 2019), here at two of their lambda.
    """
    terms = math.prod(spec.weight_shape[1:]) * spec.pattern.n // spec.pattern.m
    return min(terms / 2, math.sqrt(terms), MOST_SUMMED)


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """The float64 result, and how far off each element of a right kernel may be.

    A kernel sums in float32, and rounds to the layer's dtype after each step at the most: the product (dense adds the
    bias apart where the input is strided), the bias, the activation, by whose slope earlier errors grow, the residual.
    """
    masked = (case.weight * magnitude_mask_naive(case.weight, case.spec.pattern)).double()
    x, e, channels = case.x.double(), case.epilogue, -1 if case.spec.op == "linear" else 1
    product = dense(x, masked, case.spec)
    z = epilogue_naive(product, Epilogue(e.bias), channels)
    activated = epilogue_naive(product, Epilogue(e.bias, e.activation), channels)
    want = epilogue_naive(product, e, channels)

    info = torch.finfo(case.spec.dtype)
    magnitude = dense(x.abs(), masked.abs(), case.spec)
    magnitude = epilogue_naive(magnitude, Epilogue(None if e.bias is None else e.bias.abs()), channels)
    slip = info.eps / 2 * (product.abs() + z.abs()) + summed(case.spec) * torch.finfo(torch.float32).eps * magnitude
    if e.activation == "geglu":
        (value, gate), (of_value, of_gate) = z.abs().chunk(2, dim=-1), slip.chunk(2, dim=-1)
        slip = of_value * gate + value * of_gate
    return want, SLOPE * slip + info.eps * (activated.abs() + want.abs()) + info.smallest_normal * info.eps


def call(x: Tensor, values: Tensor, index: Tensor, kernel: Kernel, spec: LayerSpec, epilogue: Epilogue) -> Tensor:
    layer = (kernel.name, str(spec.pattern), spec.weight_shape)
    rest = (epilogue.bias, epilogue.activation, epilogue.residual)
    if spec.op == "linear":
        return torch.ops.sparsedm.linear(x, values, index, *layer, *rest)
    conv = (spec.stride, spec.padding, spec.dilation, spec.groups)
    return torch.ops.sparsedm.conv(x, values, index, *layer, *conv, *rest)


def strides(tensor: Tensor) -> list[int]:
    """Those that say where an element lies: of sizes above one."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize(
    "seed", [*range(FEW), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FEW, CASES))]
)
def test_every_kernel_equals_the_exact_product(seed: int) -> None:
    case = draw_case(seed)
    spec, (want, tolerance) = case.spec, exact(case)
    # A channels_last weight makes dense answer in channels_last; it is swap_kernels that sees to this.
    layout = dense(case.x, case.weight.clone(memory_format=torch.contiguous_format), spec)
    gated = case.epilogue.activation == "geglu"
    if gated:
        layout = layout.chunk(2, dim=-1)[0].contiguous()
    if spec.op == "conv3d":  # of which small ones in dense answer contiguous
        layout = layout.contiguous(memory_format=suggest_memory_format(case.x))
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        for kernel in map(get_kernel, kernel_names()):
            refusal = kernel.refusal(spec)
            assert refusal != "", kernel.name
            if refusal is None and (kernel.gates(spec) or not gated):
                check(kernel, case, want, tolerance, layout)
    finally:
        torch.set_num_threads(before)


def check(kernel: Kernel, case: Case, want: Tensor, tolerance: Tensor, layout: Tensor) -> None:
    packed = kernel.pack(case.weight.reshape(case.spec.weight_shape), case.spec)
    got = call(case.x, *packed, kernel, case.spec, case.epilogue)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(case.x), *packed, kernel, case.spec, case.epilogue)
    said = f"{kernel.name}: {case}"
    assert got.shape == fake.shape == layout.shape, said
    assert got.dtype == fake.dtype == layout.dtype, said
    if got.numel():
        assert strides(got) == strides(fake) == strides(layout), said
        worst = ((got - want).abs() / tolerance).max().item()
        assert worst <= 1, f"{said}: {worst:.2f} of what rounding explains"


@pytest.mark.parametrize(("width", "off", "told"), [(4, 3, True), (4, 0.5, False), (64, 7.5, True), (64, 3, False)])
def test_an_error_beyond_rounding_is_told(width: int, off: float, told: bool) -> None:
    # What is kept cancels to 0, so that rounding the result explains nothing.
    x, weight = torch.ones(1, width), torch.ones(1, width)
    x[:, 1::4] = -1
    weight[:, 2::4] = weight[:, 3::4] = 0.5
    case = Case(LayerSpec("linear", (1, width), Pattern(2, 4), torch.float32), x, weight, Epilogue(), 1)
    want, tolerance = exact(case)
    assert want.item() == 0
    error = off * torch.finfo(torch.float32).eps * width / 2
    assert (error > tolerance.item()) == told
