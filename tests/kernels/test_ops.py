"""sparsedm::linear, conv2d and unpack: contracts (opcheck), values, gradients and FLOPs, for every kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import sparsedm_compile.kernels.ops  # noqa: F401  (registers the operators)
from sparsedm_compile.kernels import LayerSpec, get_kernel
from sparsedm_compile.masks import magnitude_mask_naive
from sparsedm_compile.pattern import Pattern

KERNELS = ["reference", "cpu", "onednn"]
ACTIVATIONS = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}
CONVS = {
    "3x3": ((32, 16, 3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": ((32, 16, 1, 1), (1, 1), (0, 0), (1, 1)),
    "stride2": ((32, 16, 3, 3), (2, 2), (1, 1), (1, 1)),
    "odd": ((16, 32, 3, 2), (2, 1), (2, 0), (1, 2)),
}


def able(kernel: str, spec: LayerSpec):
    refusal = get_kernel(kernel).refusal(spec)
    if refusal is not None:
        pytest.skip(f"{kernel}: {refusal}")
    return get_kernel(kernel)


def random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked64(weight: Tensor, pattern: str) -> Tensor:
    return (weight * magnitude_mask_naive(weight, Pattern.parse(pattern))).double()


def linear_case(
    kernel,
    pattern="2:4",
    bias=True,
    residual=False,
    activation="none",
    x_shape=(2, 9, 64),
    grad=False,
    dtype=torch.float32,
):
    weight = (random(32, 64) / 8).to(dtype)
    spec = LayerSpec("linear", (32, 64), Pattern.parse(pattern), dtype)
    values, index = able(kernel, spec).pack(weight, spec)
    x = random(*x_shape, seed=1).to(dtype).requires_grad_(grad)
    b = random(32, seed=2).to(dtype).requires_grad_(grad) if bias else None
    r = random(*x_shape[:-1], 32, seed=3).to(dtype).requires_grad_(grad) if residual else None
    return (x, values, index, kernel, pattern, [32, 64], b, activation, r), weight


def conv_case(
    kernel, conv="3x3", pattern="2:4", bias=True, residual=False, activation="none", grad=False, dtype=torch.float32
):
    shape, stride, padding, dilation = CONVS[conv]
    weight = (random(*shape) / 12).to(dtype)
    spec = LayerSpec("conv2d", shape, Pattern.parse(pattern), dtype, "cpu", stride, padding, dilation)
    values, index = able(kernel, spec).pack(weight, spec)
    x = random(2, shape[1], 9, 8, seed=1).to(dtype).requires_grad_(grad)
    b = random(shape[0], seed=2).to(dtype).requires_grad_(grad) if bias else None
    out = F.conv2d(x.detach(), weight, None, stride, padding, dilation)
    r = random(*out.shape, seed=3).to(dtype).requires_grad_(grad) if residual else None
    args = (x, values, index, kernel, pattern, list(shape), list(stride), list(padding), list(dilation), 1)
    return (*args, b, activation, r), weight


# The other parts of opcheck look at storages, and oneDNN's opaque tensors have none.
_WITHOUT_STORAGE = ("test_aot_dispatch_dynamic",)


def opcheck(operator, args, kernel: str) -> None:
    torch.library.opcheck(operator, args, test_utils=_WITHOUT_STORAGE if kernel == "onednn" else "ALL")


EPILOGUES = [(False, False, "none"), (True, False, "none"), (True, True, "gelu"), (False, True, "silu")]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("bias", "residual", "activation"), EPILOGUES)
def test_opcheck_linear(kernel, bias, residual, activation):
    args, _ = linear_case(kernel, "2:4", bias, residual, activation, grad=True)
    opcheck(torch.ops.sparsedm.linear.default, args, kernel)


def gated_case(kernel, grad=True):
    weight = random(256, 64) / 8
    spec = LayerSpec("linear", (256, 64), Pattern(2, 4))
    x, b, r = (random(*shape, seed=i).requires_grad_(grad) for i, shape in enumerate([(3, 64), (256,), (3, 128)]))
    return (x, *able(kernel, spec).pack(weight, spec), kernel, "2:4", [256, 64], b, "geglu", r), weight


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_geglu(kernel):
    args, weight = gated_case(kernel)
    opcheck(torch.ops.sparsedm.linear.default, args, kernel)
    wanted = [t.detach().double().requires_grad_() for t in (args[0], args[6], args[8])]
    value, gate = F.linear(wanted[0], masked64(weight, "2:4"), wanted[1]).chunk(2, dim=-1)
    want = value * F.gelu(gate) + wanted[2]
    check_against(torch.ops.sparsedm.linear(*args), want, (args[0], args[6], args[8]), wanted)


def test_a_kernel_that_does_not_gate_says_so():
    args, _ = gated_case("onednn", grad=False)
    with pytest.raises(ValueError, match=r"kernel 'onednn' does not apply geglu to a weight of shape \(256, 64\)"):
        torch.ops.sparsedm.linear(*args)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("conv", CONVS)
def test_opcheck_conv(kernel, conv):
    args, _ = conv_case(kernel, conv, "2:4v2", bias=True, residual=True, activation="silu", grad=True)
    opcheck(torch.ops.sparsedm.conv.default, args, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck_channels_last(kernel):
    args, _ = conv_case(kernel, bias=False)
    x = args[0].contiguous(memory_format=torch.channels_last)
    opcheck(torch.ops.sparsedm.conv.default, (x, *args[1:]), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_linear_in_half_precision(kernel, dtype):
    args, _ = linear_case(kernel, "2:4", True, True, "gelu", dtype=dtype)
    opcheck(torch.ops.sparsedm.linear.default, args, kernel)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_conv2d_in_half_precision(kernel, dtype):
    args, _ = conv_case(kernel, "stride2", "2:4v2", True, True, "silu", dtype=dtype)
    opcheck(torch.ops.sparsedm.conv.default, args, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("op", ["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_unpack(kernel, op, dtype):
    args, weight = linear_case(kernel, dtype=dtype) if op == "linear" else conv_case(kernel, dtype=dtype)
    conv = ([1, 1], [0, 0], [1, 1], 1) if op == "linear" else args[6:10]
    unpack_args = (args[1], args[2], op, kernel, "2:4", list(weight.shape), *conv)
    opcheck(torch.ops.sparsedm.unpack.default, unpack_args, kernel)
    assert torch.equal(torch.ops.sparsedm.unpack(*unpack_args).double(), masked64(weight, "2:4"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4v4"])
def test_linear_and_its_gradients(kernel, activation, bias, residual, pattern):
    args, weight = linear_case(kernel, pattern, bias, residual, activation, grad=True)
    wanted = [t.detach().double().requires_grad_() if t is not None else None for t in (args[0], args[6], args[8])]
    x, b, r = wanted
    want = ACTIVATIONS[activation](F.linear(x, masked64(weight, pattern), b))
    want = want if r is None else want + r
    check_against(torch.ops.sparsedm.linear(*args), want, (args[0], args[6], args[8]), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("conv", ["3x3", "odd"])
def test_conv2d_and_its_gradients(kernel, activation, bias, residual, conv):
    args, weight = conv_case(kernel, conv, "2:4v2", bias, residual, activation, grad=True)
    wanted = [t.detach().double().requires_grad_() if t is not None else None for t in (args[0], args[10], args[12])]
    x, b, r = wanted
    _, stride, padding, dilation = CONVS[conv]
    want = ACTIVATIONS[activation](F.conv2d(x, masked64(weight, "2:4v2"), b, stride, padding, dilation))
    want = want if r is None else want + r
    check_against(torch.ops.sparsedm.conv(*args), want, (args[0], args[10], args[12]), wanted)


def check_against(got: Tensor, want: Tensor, inputs, wanted) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = random(*want.shape, seed=4)
    got.backward(upstream)
    want.backward(upstream.double())
    for mine, theirs in zip(inputs, wanted, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 4, 64)], ids=str)
def test_linear_takes_any_leading_dimensions(kernel, shape):
    args, weight = linear_case(kernel, x_shape=shape)
    want = F.linear(args[0].double(), masked64(weight, "2:4"), args[6].double())
    torch.testing.assert_close(torch.ops.sparsedm.linear(*args).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_takes_any_strides(kernel):
    args, _ = linear_case(kernel, x_shape=(6, 9, 64))
    want = torch.ops.sparsedm.linear(*args)
    for x in (args[0].transpose(0, 1).contiguous().transpose(0, 1), torch.cat([args[0]] * 2, -1)[..., :64]):
        got = torch.ops.sparsedm.linear(x, *args[1:])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert got.is_contiguous()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("conv", CONVS)
def test_conv2d_answers_in_the_memory_format_of_dense(kernel, conv):
    args, weight = conv_case(kernel, conv)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = args[0].contiguous(memory_format=memory_format)
        got = torch.ops.sparsedm.conv(x, *args[1:])
        assert got.stride() == F.conv2d(x, weight, None, *CONVS[conv][1:]).stride()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("pattern", "share"), [("2:4", (1, 2)), ("1:4", (1, 4)), ("7:8", (7, 8)), ("2:4v4", (1, 2))])
def test_flops_are_those_that_are_done(kernel, pattern, share):
    for case, op in ((linear_case, torch.ops.sparsedm.linear), (conv_case, torch.ops.sparsedm.conv)):
        args, weight = case(kernel, pattern=pattern)
        dense = FlopCounterMode(display=False)
        with dense:
            F.linear(args[0], weight) if weight.dim() == 2 else F.conv2d(args[0], weight, None, 1, 1)
        sparse = FlopCounterMode(display=False)
        with sparse:
            op(*args)
        assert sparse.get_total_flops() * share[1] == dense.get_total_flops() * share[0] > 0


def test_flops_of_a_packed_product_on_meta():
    args, _ = linear_case("reference")
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    with FlopCounterMode(display=False) as counter:
        torch.ops.sparsedm.linear(*meta)
    assert counter.get_total_flops() == 2 * 18 * 32 * 64 // 2


def test_errors():
    args, _ = linear_case("reference")
    with pytest.raises(ValueError, match=r"unknown kernel 'warp'.*reference"):
        torch.ops.sparsedm.linear(*args[:3], "warp", *args[4:])
    with pytest.raises(ValueError, match=r"unknown activation 'relu'.*gelu_tanh"):
        torch.ops.sparsedm.linear(*args[:7], "relu", None)
    with pytest.raises(ValueError, match="unknown pattern"):
        torch.ops.sparsedm.linear(*args[:4], "2of4", *args[5:])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_input_width_is_refused_while_tracing_and_while_running(kernel):
    args, _ = linear_case(kernel)
    wrong = random(2, 9, 60)
    with pytest.raises(Exception, match="last dimension of x is 60, the weight takes 64"):
        torch.compile(lambda x: torch.ops.sparsedm.linear(x, *args[1:]), backend="eager")(wrong)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.sparsedm.linear(wrong, *args[1:])


def test_no_geglu_behind_convolutions():
    spec = LayerSpec("conv2d", (256, 8, 1, 1), Pattern(2, 4))
    packed = able("reference", spec).pack(torch.randn(256, 8, 1, 1), spec)
    constants = ("reference", "2:4", [256, 8, 1, 1], [1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(ValueError, match="geglu follows linear layers alone"):
        torch.ops.sparsedm.conv(torch.randn(1, 8, 2, 2), *packed, *constants, None, "geglu")
