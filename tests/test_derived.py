"""Derived weights: found by identity, renewed after any change, freed with the weight, safe among threads."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.derived import DerivedWeights, Request


class Counted:
    """Builds ``(2 w,)`` and counts."""

    def __init__(self):
        self.builds = 0

    def __call__(self, weight):
        self.builds += 1
        return (weight * 2,)


@pytest.fixture
def build():
    return Counted()


@pytest.fixture
def weights():
    return DerivedWeights()


def get(weights, weight, build, key="double"):
    ((derived,),) = weights.get([Request(weight, key, build)])
    return derived


def make_weight(*shape):
    return nn.Parameter(torch.randn(*(shape or (64, 32))))


def test_builds_once(weights, build):
    weight = make_weight()
    first = get(weights, weight, build)
    assert torch.equal(first, weight * 2)
    assert get(weights, weight, build) is first
    assert build.builds == 1


def add_in_place(weight):
    with torch.no_grad():
        weight.add_(1)


def data_add(weight):
    weight.data += 1


def data_replaced(weight):
    weight.data = torch.randn_like(weight)


def data_replaced_by_another_shape(weight):
    weight.data = torch.randn(32, 64)


def data_replaced_by_another_dtype(weight):
    weight.data = weight.data.double()


def optimizer_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def one_row_in_place(weight):
    with torch.no_grad():
        weight[3, 5] = 9.0


CHANGES = [
    add_in_place,
    data_add,
    data_replaced,
    data_replaced_by_another_shape,
    data_replaced_by_another_dtype,
    optimizer_step,
    one_row_in_place,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_change_is_noticed(weights, build, change):
    weight = make_weight()
    get(weights, weight, build)
    change(weight)
    assert torch.equal(get(weights, weight, build), weight.detach() * 2)
    assert build.builds == 2


def test_equal_weights_are_told_apart(weights, build):
    one, two = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    assert get(weights, one, build) is not get(weights, two, build)
    assert build.builds == 2


def test_forms_of_one_weight_live_side_by_side(weights, build):
    weight, other = make_weight(), Counted()
    a, b = get(weights, weight, build, "a"), get(weights, weight, other, "b")
    assert get(weights, weight, build, "a") is a
    assert get(weights, weight, other, "b") is b
    assert (build.builds, other.builds) == (1, 1)


def test_all_forms_are_renewed_after_a_change(weights, build):
    weight, other = make_weight(), Counted()
    get(weights, weight, build, "a"), get(weights, weight, other, "b")
    add_in_place(weight)
    get(weights, weight, build, "a")
    assert torch.equal(get(weights, weight, other, "b"), weight * 2)
    assert other.builds == 2


def test_several_requests_keep_their_order(weights, build):
    one, two = make_weight(), make_weight(8, 8)
    (a,), (b,), (c,) = weights.get([Request(one, 0, build), Request(two, 0, build), Request(one, 1, build)])
    assert (a.shape, b.shape, c.shape) == (one.shape, two.shape, one.shape)
    assert weights.get([]) == []


def test_entries_die_with_their_weight(weights, build):
    weight = make_weight()
    derived = weakref.ref(get(weights, weight, build))
    assert derived() is not None
    del weight
    gc.collect()
    assert derived() is None


def test_drop(weights, build):
    weight = make_weight()
    get(weights, weight, build)
    weights.drop(weight)
    weights.drop(weight)  # nothing to forget is no error
    get(weights, weight, build)
    assert build.builds == 2


def test_built_under_inference_mode_serves_autograd_later(weights, build):
    weight = make_weight()
    with torch.inference_mode():
        derived = get(weights, weight, build)
    assert not derived.is_inference()
    x = torch.randn(3, 32, requires_grad=True)
    (x @ get(weights, weight, build).T).sum().backward()
    assert x.grad is not None
    assert build.builds == 1


def test_inference_tensors_as_weights(weights, build):
    with torch.inference_mode():
        weight = torch.randn(8, 8)
        get(weights, weight, build)
        weight.add_(1)  # inference tensors count no versions; the checksum sees it
        assert torch.equal(get(weights, weight, build), weight * 2)


def test_derived_tensors_carry_no_graph(weights, build):
    weight = make_weight()
    assert not get(weights, weight, build).requires_grad


def test_a_failed_build_leaves_nothing(weights, build):
    weight = make_weight()

    def fail(_):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        get(weights, weight, fail)
    assert torch.equal(get(weights, weight, build), weight * 2)


def test_threads_share_one_build(weights, build):
    weight, barrier, found = make_weight(256, 256), threading.Barrier(8), []

    def run():
        barrier.wait()
        found.append(get(weights, weight, build))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.builds == 1
    assert all(tensor is found[0] for tensor in found)


def test_threads_and_dying_weights(weights):
    errors = []

    def run():
        try:
            for _ in range(100):
                weight = make_weight(8, 8)
                assert torch.equal(get(weights, weight, lambda w: (w * 2,)), weight * 2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_refresh_sees_what_a_sample_cannot():
    # 64 sampled elements of 1,000,000: this change is most likely outside, and refresh is the documented way.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 1000)).eval()
    sdm.sparsify(model, "2:4", policy="all")
    x = torch.randn(1, 1000)
    with torch.no_grad():
        model(x)
        model[0].weight.data[::, 501] += 3
        sdm.refresh(model)
        got = model(x)
        want = x @ sdm.masked_weight(model[0].weight, "2:4").T + model[0].bias
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
