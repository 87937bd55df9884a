"""torch.compile(backend="sparsedm"): found, right, compiled once, and right again after every change of a weight."""

import contextlib
import copy
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import sparsedm_compile as sdm

# Measuring would make the tests depend on the machine's mood. The reference kernel stands in without a compiler.
FORCED = {"kernel": "cpu"}
WIDTH = 64


class Block(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class ConvBlock(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def blocks(count=12, pattern="2:4", kind=Block) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(kind() for _ in range(count))).eval()
    sdm.sparsify(model, pattern, policy="all")
    return model


def compile_each(model: nn.Sequential, **kwargs) -> list:
    return [torch.compile(block, backend="sparsedm", options=FORCED, fullgraph=True, **kwargs) for block in model]


def run(compiled: list, x):
    for block in compiled:
        x = block(x)
    return x


@pytest.fixture
def check(masked_dense):
    """``check(got, model, x)``: against a float64 copy of the model with its weights masked."""

    def close(got, model: nn.Module, x, rel=1e-5) -> None:
        with torch.no_grad():
            want = masked_dense(model).double()(x.double())
        assert (got.double() - want).norm() <= rel * want.norm()

    return close


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def x():
    return torch.randn(4, 17, WIDTH, generator=torch.Generator().manual_seed(1))


# --- found -------------------------------------------------------------------------------------------------------


def test_a_fresh_interpreter_that_imported_only_torch_finds_it():
    script = """
import sys, torch
assert "sparsedm" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert "sparsedm_compile" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()
compiled = torch.compile(model, backend="sparsedm", options={"pattern": "2:4", "policy": "all", "kernel": "reference"})
with torch.no_grad():
    x = torch.ones(2, 64)
    kept = model[0].weight.abs().reshape(64, 16, 4)
    mask = kept >= kept.topk(2).values[..., 1:]
    want = x @ (model[0].weight * mask.reshape(64, 64)).T + model[0].bias
    assert torch.allclose(compiled(x), want, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"patern": "2:4"}}, r"unknown option 'patern' for backend 'sparsedm': one of pattern"),
        ({"options": {"kernel": "warp"}}, r"unknown kernel 'warp': one of auto, dense, cpu"),
        ({"options": {"pattern": "2-4"}}, "unknown pattern '2-4'"),
        ({"options": {"pattern": "4:2"}}, "n must be smaller than m"),
        ({"options": {"dump_graphs": "x", "dump_pass": "nothing"}}, r"unknown pass 'nothing': one of find_layers"),
        ({"options": {"pattern": "2:4", "policy": "best"}}, "unknown policy 'best'"),
        ({"options": {"pattern": "2:4", "rules": {"nothing": "dense"}}}, "rule 'nothing' matches no layer"),
        ({"options": {"pattern": "2:4", "policy": "all", "rules": {"fc1": "2:4v3"}}}, "power of two"),
        ({"options": {"rules": {"fc1": "2:4"}}}, "option 'rules' needs 'pattern'"),
        ({"mode": "fastest"}, "Unrecognized mode=fastest"),
    ],
)
def test_bad_options_are_refused_by_name(kwargs, message, x):
    with pytest.raises(Exception, match=message):
        torch.compile(Block(), backend="sparsedm", **kwargs)(x)


# --- equal blocks ----------------------------------------------------------------------------------------------------


def in_place(block, other):
    with torch.no_grad():
        block.fc1.weight.add_(other.fc1.weight)


def load(block, other):
    block.load_state_dict(other.state_dict())


def load_assign(block, other):
    block.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def data_replaced(block, other):
    block.fc1.weight.data = other.fc1.weight.data.clone()


def data_add(block, other):  # how LoRA is fused
    block.fc1.weight.data += other.fc1.weight.data


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_twelve_equal_blocks_compile_once_and_follow_their_weights(mode, x, check):
    model = blocks(12)
    compiled = compile_each(model)
    with mode():
        x = x.clone()  # an inference tensor like what the blocks pass on: Dynamo compiles for each of the two kinds
        check(run(compiled, x), model, x)
    assert graphs() == 1
    for i, change in enumerate([in_place, load, load_assign, data_replaced, data_add]):
        change(model[i], Block())
        with mode():
            check(run(compiled, x), model, x)
    assert graphs() == 1


def test_equal_convolution_blocks(x, check):
    model = blocks(4, "2:4v2", ConvBlock)
    compiled, image = compile_each(model), torch.randn(2, WIDTH, 8, 8)
    with torch.no_grad():
        check(run(compiled, image), model, image)
        model[2].conv1.weight.data += torch.randn_like(model[2].conv1.weight)
        check(run(compiled, image), model, image)
    assert graphs() == 1


def test_blocks_of_two_patterns(x, check):
    model = blocks(6)
    sdm.set_pattern(model, "2:4", rules={"1.*": "1:4", "4.fc2": "1:4v4"})
    compiled = compile_each(model)
    with torch.no_grad():
        check(run(compiled, x), model, x)
        check(run(compiled, x), model, x)
    assert graphs() == 3


def test_one_set_of_weights_in_two_blocks(x, check):
    model = blocks(2)
    model[1].fc1.weight = model[0].fc1.weight
    compiled = compile_each(model)
    with torch.no_grad():
        check(run(compiled, x), model, x)
        model[0].fc1.weight.mul_(2)
        check(run(compiled, x), model, x)


def test_two_threads_at_once(check):
    model = blocks(3)
    compiled = compile_each(model)
    inputs = [torch.randn(4, 17, WIDTH) for _ in range(2)]
    with torch.no_grad():
        run(compiled, inputs[0])
        sdm.refresh(model)  # both threads meet weights that are not packed
        barrier, results, errors = threading.Barrier(2), {}, []

        def work(i):
            try:
                with torch.no_grad():
                    barrier.wait()
                    results[i] = [run(compiled, inputs[i]) for _ in range(20)]
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for i in range(2):
        for got in results[i]:
            check(got, model, inputs[i])


def test_a_thread_that_switches_weights_under_another(check):
    model = blocks(1)
    (compiled,) = compile_each(model)
    state = [copy.deepcopy(Block().state_dict()) for _ in range(2)]
    x, stop, errors = torch.randn(2, 3, WIDTH), threading.Event(), []

    def change():
        while not stop.is_set():
            for s in state:
                model[0].load_state_dict(s)

    thread = threading.Thread(target=change)
    with torch.no_grad():
        compiled(x)
        thread.start()
        try:
            for _ in range(50):
                compiled(x)
        except Exception as error:
            errors.append(error)
        stop.set()
        thread.join()
        assert not errors
        model[0].load_state_dict(state[0])
        check(compiled(x), model, x)


# --- patterns at run time ------------------------------------------------------------------------------------------


def test_switching_patterns_recompiles_nothing_the_second_time(x, check):
    model = blocks(2)
    sdm.set_pattern(model, "dense")
    compiled = torch.compile(model, backend="sparsedm", options=FORCED, fullgraph=True)
    outputs, seen = {}, []
    with torch.no_grad():
        for pattern in ("dense", "2:4", "1:4", "dense", "2:4", "1:4", "2:4"):
            sdm.set_pattern(model, pattern)
            got = compiled(x)
            check(got, model, x)
            outputs.setdefault(pattern, got)
            assert torch.equal(outputs[pattern], got)
            seen.append(graphs())
    assert seen == [1, 2, 3, 3, 3, 3, 3]
    assert not torch.allclose(outputs["2:4"], outputs["1:4"])


def test_use_pattern_with_a_compiled_model(x, check):
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    with torch.no_grad():
        compiled(x)
        with sdm.use_pattern(compiled, "dense"):
            check(compiled(x), model, x)
        check(compiled(x), model, x)


# --- shapes, dtypes ------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Convolutions over images of any size, then linears over their pixels."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.mid = nn.Conv2d(64, 64, 3, padding=1)
        self.out = nn.Linear(64, 32)

    def forward(self, x):
        x = self.mid(F.silu(self.down(x)))
        return self.out(x.flatten(2).transpose(1, 2))


SHAPES = [(2, 16, 16), (3, 16, 16), (4, 16, 16), (2, 24, 24), (5, 32, 16), (1, 16, 16), (7, 20, 20)]


@pytest.mark.parametrize("kernel", ["auto", "cpu"])
def test_new_shapes_recompile_no_more_than_inductor_does(kernel, check):
    def count(model, **kwargs):
        torch._dynamo.reset()
        counters.clear()
        compiled, seen = torch.compile(model, **kwargs), []
        with torch.no_grad():
            for batch, height, width in SHAPES:
                image = torch.randn(batch, 32, height, width)
                check(compiled(image), model, image)
                seen.append(graphs())
        return seen

    torch.manual_seed(0)
    model = Pyramid().eval()
    dense = count(model, backend="inductor")
    sdm.sparsify(model, "2:4", policy="all")
    sparse = count(model, backend="sparsedm", options={"kernel": kernel})
    assert all(mine <= theirs for mine, theirs in zip(sparse, dense, strict=True))


def test_dynamic_true(check):
    model = blocks(1)
    (compiled,) = compile_each(model, dynamic=True)
    with torch.no_grad():
        for tokens in (17, 5, 33, 8):
            x = torch.randn(4, tokens, WIDTH)
            check(compiled(x), model, x)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        *(("cpu", shape) for shape in [(WIDTH,), (0, 5, WIDTH), (2, 3, 4, WIDTH)]),
        *((kernel, (WIDTH,)) for kernel in ("auto", "onednn", "reference")),
        ("onednn", (0, 5, WIDTH)),
    ],
    ids=str,
)
def test_inputs_of_any_rank(kernel, shape, check):
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm", options={"kernel": kernel}, fullgraph=True)
    with torch.no_grad():
        image = torch.randn(shape)
        check(compiled(image), model, image)


@pytest.mark.parametrize(
    ("kernel", "layout"),
    [
        *(("cpu", layout) for layout in ("contiguous", "channels_last", "one image")),
        *((kernel, "channels_last") for kernel in ("onednn", "reference", "dense")),
        ("auto", "one image"),
    ],
)
def test_images(kernel, layout, check):
    convs = [
        nn.Conv2d(32, 64, 3, padding="same", bias=False),
        nn.Conv2d(64, 64, 3, padding="valid", stride=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, (1, 3), padding=(0, 1), padding_mode="circular"),
        nn.Conv2d(64, 32, 2, padding="same"),
        nn.Conv2d(32, 32, 3, dilation=2, padding=2),
    ]
    torch.manual_seed(0)
    model = nn.Sequential(*convs).eval()
    sdm.sparsify(model, "2:4", policy="all")
    compiled = torch.compile(model, backend="sparsedm", options={"kernel": kernel}, fullgraph=True)
    image = torch.randn(2, 32, 11, 10)
    if layout == "one image":
        image = image[0]
    elif layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got = compiled(image)
        check(got, model, image)
        assert got.stride() == model(image).stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_changed_after_compiling(dtype, x, check):
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    with torch.no_grad():
        compiled(x)
        model.to(dtype)
        got = compiled(x.to(dtype))
        assert got.dtype == dtype
        check(got, model, x, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
        model.float()
        check(compiled(x), model, x, rel=1e-5)


def test_a_weight_of_another_shape_after_compiling(x, check):
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    with torch.no_grad():
        compiled(x)
        model[0].fc1.weight.data = torch.randn(96, WIDTH)
        model[0].fc1.bias.data = torch.randn(96)
        model[0].fc2.weight.data = torch.randn(WIDTH, 96)
        check(compiled(x), model, x)
        model[0].fc1.weight.data = torch.randn(96, WIDTH - 2)
        with pytest.raises(Exception, match=r"62|shape|cannot be 2:4"):
            compiled(x)


def test_a_weight_that_became_nan_is_named_or_spreads(x):
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    with torch.no_grad():
        compiled(x)
        model[0].fc1.weight[3, 4] = float("nan")
        with contextlib.suppress(ValueError):  # the kernel may refuse; it must not make numbers up
            assert compiled(x).isnan().any()


def test_input_of_another_dtype_than_the_weight():
    layer = nn.Linear(WIDTH, WIDTH)
    sdm.sparsify(layer, "2:4")
    compiled = torch.compile(layer, backend="sparsedm", options=FORCED)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"dtype"):
        compiled(torch.randn(2, WIDTH, dtype=torch.float64))


# --- plain dense models --------------------------------------------------------------------------------------------


def dense_block():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def test_a_plain_dense_model(x, check):
    model = dense_block()
    options = {"pattern": "2:4", "policy": "all", "rules": {"1.fc2": "dense", "1.fc1": "1:4"}, **FORCED}
    compiled = torch.compile(model, backend="sparsedm", options=options, fullgraph=True)
    with torch.no_grad():
        got = compiled(x)
        twin = copy.deepcopy(model)
        sdm.sparsify(twin, "2:4", policy="all", rules={"1.fc2": "dense", "1.fc1": "1:4"})
        check(got, twin, x)
        model[0].fc1.weight.data += 1  # and it follows its weights
        twin[0].fc1.weight.data += 1
        check(compiled(x), twin, x)
    assert type(model[0].fc1) is nn.Linear


def test_a_plain_dense_model_without_a_pattern_stays_dense(x, check):
    model = dense_block()
    with torch.no_grad():
        check(torch.compile(model, backend="sparsedm")(x), model, x)


def test_a_pattern_for_a_model_that_has_its_own(x):
    compiled = torch.compile(blocks(1), backend="sparsedm", options={"pattern": "1:4"})
    with torch.no_grad(), pytest.raises(Exception, match=r"layer '0.fc1' was made sparse by sparsify"):
        compiled(x)


def test_an_exact_rule_that_cannot_hold(x):
    model = nn.Sequential(nn.Linear(WIDTH, 34), nn.Linear(34, 64))
    options = {"pattern": "2:4", "policy": "all", "rules": {"1": "2:4"}}
    with torch.no_grad(), pytest.raises(Exception, match="layer '1' cannot be 2:4 as its rule demands: input width 34"):
        torch.compile(model, backend="sparsedm", options=options)(x)


# --- what else stands in the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_changes_in_place_whose_result_nobody_reads(grad, x):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            y = self.layer(x).clone()
            y.mul_(3)
            self.calls.add_(1)
            y[0] = 7
            F.relu(y, inplace=True)
            return y

    torch.manual_seed(0)
    model = Scaled().eval()
    sdm.sparsify(model, "2:4", policy="all")
    compiled = torch.compile(model, backend="sparsedm", options=FORCED, fullgraph=True)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert model.calls == 2


# --- modes, Inductor, dumps, memory --------------------------------------------------------------------------------


def test_a_mode_of_inductor(x, monkeypatch, check):
    seen = []
    from torch._inductor import compile_fx

    inner = compile_fx.compile_fx
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda *a, **k: seen.append(k.get("config_patches")) or inner(*a, **k)
    )
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm", mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        check(compiled(x), model, x)
    assert seen[0]["max_autotune"] is True


def test_an_option_of_inductor(x, check):
    from torch._inductor.utils import run_and_get_code

    model = blocks(1)
    for fusion in (True, False):
        torch._dynamo.reset()
        options = {"cpp.simdlen": 0 if not fusion else None, "kernel": "dense"}
        compiled = torch.compile(model, backend="sparsedm", options=options)
        with torch.no_grad():
            got, codes = run_and_get_code(compiled, x)
        check(got, model, x)
        assert ("at::vec::Vectorized" in "".join(codes)) is fusion


def test_compiled_graphs_are_kept_on_disk(x):
    compiled = torch.compile(blocks(1), backend="sparsedm", options=FORCED)
    compiled(x)
    with torch.no_grad():
        compiled(x)
    assert counters["inductor"]["fxgraph_cache_bypass"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["inductor"]["fxgraph_cache_miss"] >= 2


def test_the_mask_is_fused_although_inductor_ran_before(x):
    from torch._inductor import decomposition
    from torch._inductor.utils import run_and_get_code

    operator = torch.ops.sparsedm.masked_weight.default
    decomposition.decompositions.pop(operator, None)
    decomposition.select_decomp_table().pop(operator, None)
    torch.compile(torch.sin)(x)  # Inductor copies its table
    _, codes = run_and_get_code(torch.compile(blocks(1), backend="sparsedm"), x)
    assert "torch.ops.sparsedm.masked_weight" not in "".join(codes)


def test_graphs_on_disk_do_not_outlive_a_change_of_the_mask(x, monkeypatch):
    from sparsedm_compile import backend

    model = nn.Linear(WIDTH, WIDTH, bias=False)
    sdm.sparsify(model, "2:4")
    torch.compile(model, backend="sparsedm")(x)

    def another_mask(weight, pattern):
        return weight * 7

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "mask_out", another_mask)
    backend._mask_digest.cache_clear()
    try:
        torch.testing.assert_close(torch.compile(model, backend="sparsedm")(x), x @ model.weight.T * 7)
    finally:
        backend._mask_digest.cache_clear()


def test_graph_dumps(tmp_path, x):
    compiled = torch.compile(blocks(1), backend="sparsedm", options={"dump_graphs": str(tmp_path / "all"), **FORCED})
    with torch.no_grad():
        compiled(x)
    written = {path.name.split("_", 1)[1]: path.read_text() for path in (tmp_path / "all").iterdir()}
    assert {"0_find_layers_before.txt", "2_swap_kernels_before.txt", "2_swap_kernels_after.txt"} <= set(written)
    assert "masked_weight" in written["2_swap_kernels_before.txt"]
    assert "masked_weight" not in written["2_swap_kernels_after.txt"]
    assert "sparsedm.linear" in written["2_swap_kernels_after.txt"]


def test_graph_dumps_of_one_pass(tmp_path, x):
    options = {"dump_graphs": tmp_path, "dump_pass": "swap_kernels", **FORCED}
    with torch.no_grad():
        torch.compile(blocks(1), backend="sparsedm", options=options)(x)
    names = sorted(path.name.split("_", 1)[1] for path in tmp_path.iterdir())
    assert names == ["2_swap_kernels_after.txt", "2_swap_kernels_before.txt"]


def test_packed_weights_are_freed_with_the_model(x):
    from sparsedm_compile.derived import derived_weights

    model = blocks(2)
    weight = weakref.ref(model[0].fc1.weight)
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    with torch.no_grad():
        compiled(x)
    packed = [weakref.ref(t) for form in derived_weights._entries[id(weight())].forms.values() for t in form]
    assert packed
    assert all(tensor() is not None for tensor in packed)
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert all(tensor() is None for tensor in packed)


def test_the_model_itself_is_not_changed(x):
    model = blocks(1)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    with torch.no_grad():
        want = model(x)
        compiled(x)
        assert torch.equal(model(x), want)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, types)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "kind"), [("2:4", Block), ("1:4v4", Block), ("2:4v2", ConvBlock)])
def test_gradients_equal_eagers(pattern, kind):
    model = blocks(1, pattern, kind).train()
    x = torch.randn(3, 5, WIDTH) if kind is Block else torch.randn(2, WIDTH, 6, 6)
    x.requires_grad_()
    compiled = torch.compile(model, backend="sparsedm", fullgraph=True)
    model(x).square().mean().backward()
    want = [x.grad, *(p.grad for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    compiled(x).square().mean().backward()
    for got, expected in zip([x.grad, *(p.grad for p in model.parameters())], want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_straight_through(x, masked_dense):
    # Against autograd over a float64 model whose masked weights are the leaves.
    model = blocks(1)
    compiled = torch.compile(model, backend="sparsedm")
    compiled(x).square().sum().backward()
    reference = masked_dense(model).double()
    reference(x.double()).square().sum().backward()
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-3)


def test_training_then_inference_then_training(x, check):
    model = blocks(1).train()
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target, losses = torch.randn_like(x), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            check(compiled(x), model, x)  # the packed weights follow every step
    assert losses[-1] < 0.7 * losses[0]
    assert graphs() == 2


def test_gradient_checkpointing(x):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed(blocks(1))
    compiled = torch.compile(model, backend="sparsedm")
    compiled(x).square().mean().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_guidance_through_a_frozen_model(x, masked_dense):
    model = blocks(1).requires_grad_(False)
    compiled = torch.compile(model, backend="sparsedm", options=FORCED, fullgraph=True)
    x.requires_grad_()
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    reference, y = masked_dense(model).double(), x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(reference(y).square().sum(), y)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_frozen_model_without_no_grad_runs_sparse_kernels(x, tmp_path, check):
    model = blocks(1).requires_grad_(False)
    compiled = torch.compile(model, backend="sparsedm", options={"dump_graphs": tmp_path, **FORCED})
    check(compiled(x), model, x)
    assert any("swap_kernels_after" in path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(where, x, check):
    model = blocks(1)

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    compiled = torch.compile(model if where == "outside" else Inside(), backend="sparsedm", options=FORCED)
    context = torch.autocast("cpu", torch.bfloat16) if where == "outside" else contextlib.nullcontext()
    with torch.no_grad(), context:
        got = compiled(x)
        check(got, model, x, rel=2e-2)
        report = sdm.explain(compiled, x)
    assert {layer.kernel for layer in report.layers} == {"dense"}
    assert all("autocast" in layer.reason for layer in report.layers)
