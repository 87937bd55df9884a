"""explain: every layer, what ran it, and why."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsedm_compile as sdm
from sparsedm_compile.kernels import LayerSpec, choice, get_kernel
from sparsedm_compile.kernels.verdicts import VerdictStore
from sparsedm_compile.pattern import DENSE, Pattern

FORCED = {"kernel": "cpu"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.fc1 = nn.Linear(64, 128)
        self.odd = nn.Linear(128, 50)
        self.fc2 = nn.Linear(50, 64)
        self.unused = nn.Linear(64, 64)

    def forward(self, x):
        x = self.grouped(F.silu(self.conv(x)))
        return self.fc2(self.odd(F.gelu(self.fc1(x.mean((2, 3))))))


NAMES = ["conv", "grouped", "fc1", "odd", "fc2", "unused"]


@pytest.fixture
def image():
    return torch.randn(3, 32, 8, 8)


def sparse_net(**kwargs):
    torch.manual_seed(0)
    model = Net().eval()
    sdm.sparsify(model, "2:4", policy="all", **kwargs)
    return model


@pytest.fixture(scope="module")
def report():
    model = torch.compile(sparse_net(rules={"fc1": "dense"}), backend="sparsedm", options=FORCED)
    return sdm.explain(model, torch.randn(3, 32, 8, 8))


def test_lists_every_layer_in_model_order(report):
    assert [layer.name for layer in report.layers] == NAMES
    assert (report.graphs, report.mode) == (1, "inference")


@pytest.mark.parametrize(
    ("name", "pattern", "kernel", "reason"),
    [
        ("conv", "2:4", "cpu", "option kernel='cpu'"),
        ("grouped", "2:4", "dense", "'cpu' cannot take it: the cpu kernel takes convolutions of one group"),
        ("fc1", "dense", "dense", "rule 'fc1'"),
        ("odd", "2:4", "cpu", "option"),
        ("fc2", "dense", "dense", "input width 50 is not a multiple of 4"),
        ("unused", "dense", "not run", "no compiled graph used this layer"),
    ],
)
def test_each_layer_says_what_ran_and_why(report, name, pattern, kernel, reason):
    layer = report[name]
    assert (layer.kernel, layer.pattern) == (kernel, pattern)
    assert reason in layer.reason


def test_names_what_the_kernel_does_beside_the_product(image):
    if (refusal := get_kernel("cpu").refusal(LayerSpec("linear", (64, 64), Pattern(2, 4)))) is not None:
        pytest.skip(refusal)
    model = torch.compile(sparse_net(), backend="sparsedm", options=FORCED)
    found = sdm.explain(model, image)
    fused = {layer.name: (layer.fused, layer.output_shape) for layer in found.layers}
    assert fused["conv"] == (("silu",), (3, 64, 8, 8))
    assert fused["fc1"] == (("gelu",), (3, 128))
    assert "cpu + silu" in str(found)
    assert fused["odd"] == fused["grouped"] == ((), ())


def test_names_a_residual_behind_an_activation():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return x + F.silu(self.linear(x))

    if (refusal := get_kernel("cpu").refusal(LayerSpec("linear", (64, 64), Pattern(2, 4)))) is not None:
        pytest.skip(refusal)
    model = Residual().eval()
    sdm.sparsify(model, "2:4", policy="all")
    found = sdm.explain(torch.compile(model, backend="sparsedm", options=FORCED), torch.randn(5, 64))
    assert found["linear"].fused == ("silu", "residual")
    assert found["linear"].output_shape == (5, 64)


def test_table(report):
    text = str(report)
    for word in ("explain", "2 of 6 layers ran a sparse kernel", "1 graph(s), inference", "not run", *NAMES):
        assert word in text


def test_dict_is_json(report):
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["graphs"] == 1
    assert list(stored["layers"]) == NAMES
    assert stored["layers"]["conv"]["weight_shape"] == [64, 32, 3, 3]
    assert stored["layers"]["conv"]["kernel"] == "cpu"


def test_measured_layers_have_both_times(image):
    report = sdm.explain(torch.compile(sparse_net(), backend="sparsedm"), image)
    for name in ("conv", "fc1"):
        layer = report[name]
        assert layer.sparse_ms > 0
        assert layer.dense_ms > 0
        assert "x the fastest dense" in layer.reason
        # Never slower than dense: what ran is what measured faster (a tie goes to dense).
        assert (layer.kernel == "cpu") <= (layer.sparse_ms <= layer.dense_ms * 1.5)
    assert "convolutions of one group" in report["grouped"].reason
    assert report["grouped"].sparse_ms is None


def test_says_at_which_size_a_layer_was_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_store", VerdictStore())
    model = nn.Linear(64, 64).eval()
    sdm.sparsify(model, "2:4")
    monkeypatch.setattr(
        choice, "paired_times", lambda names, **_: {name: [0.5 if name == "cpu" else 1.0] * 3 for name in names}
    )
    first = sdm.explain(model, torch.randn(2, 32, 64))[""]
    monkeypatch.setattr(choice, "paired_times", None)  # nothing is timed again
    second = sdm.explain(model, torch.randn(2, 36, 64))[""]
    assert second.reason.endswith(" at 2x32x64") or second.sparse_ms is None
    assert (second.kernel, second.reason, second.dense_ms) == (first.kernel, first.reason, first.dense_ms)


def test_tells_the_time_of_torchs_own_operator_beside_that_of_the_fastest_dense_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_store", VerdictStore())
    seconds = {"dense": 4.0, "onednn": 3.0, "cpu": 1.0}
    monkeypatch.setattr(choice, "paired_times", lambda names, **_: {name: [seconds[name]] * 3 for name in names})
    model = nn.Linear(64, 64).eval()
    sdm.sparsify(model, "2:4")
    layer = sdm.explain(model, torch.randn(8, 64))[""]
    assert layer.native_ms == 4e3
    assert layer.dense_ms == (4e3 if get_kernel("onednn").refusal(LayerSpec("linear", (64, 64), DENSE)) else 3e3)


def test_counts_the_calls_of_a_layer(report):
    class Repeating(nn.Module):
        def __init__(self):
            super().__init__()
            self.many, self.one, self.none = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.one(self.many(F.relu(self.many(F.relu(self.many(x))))))

    model = Repeating().eval()
    sdm.sparsify(model, "2:4", policy="all")
    found = sdm.explain(torch.compile(model, backend="sparsedm", options=FORCED), torch.randn(4, 64))
    assert {layer.name: layer.calls for layer in found.layers} == {"many": 3, "one": 1, "none": 0}
    assert {layer.name: layer.calls for layer in report.layers} == dict.fromkeys(NAMES, 1) | {"unused": 0}


def test_the_reference_kernel_counts_as_no_sparse_kernel(image):
    compiled = torch.compile(sparse_net(), backend="sparsedm", options={"kernel": "reference"})
    report = sdm.explain(compiled, image)
    assert report["conv"].kernel == "reference"
    assert "0 of 6 layers ran a sparse kernel" in str(report)


def test_a_model_that_was_not_compiled_is_compiled(image):
    model = sparse_net()
    report = sdm.explain(model, image)
    assert [layer.name for layer in report.layers] == NAMES
    assert model._compiled_call_impl is None


def test_a_plain_dense_model(image):
    torch.manual_seed(0)
    report = sdm.explain(Net().eval(), image)
    assert {layer.pattern for layer in report.layers} == {"dense"}
    assert report["conv"].reason == "not sparsified"


def test_a_plain_model_with_a_pattern_in_the_options(image):
    options = {"pattern": "2:4", "policy": "all", "rules": {"fc1": "dense"}, **FORCED}
    report = sdm.explain(torch.compile(Net().eval(), backend="sparsedm", options=options), image)
    assert (report["conv"].kernel, report["conv"].pattern) == ("cpu", "2:4")
    assert report["fc1"].reason == "rule 'fc1'"
    assert "input width 50" in report["fc2"].reason


def test_compiled_in_place(image):
    model = sparse_net()
    model.compile(backend="sparsedm", options=FORCED)
    assert sdm.explain(model, image)["conv"].kernel == "cpu"


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Chain(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(3))
        self.head = nn.Linear(64, 64)
        sdm.sparsify(self, "2:4", policy="all", rules={"blocks.1.fc1": "dense"})
        for i, block in enumerate(self.blocks):
            if in_place:
                block.compile(backend="sparsedm", options=FORCED)
            else:
                self.blocks[i] = torch.compile(block, backend="sparsedm", options=FORCED)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_compiled_one_by_one(in_place):
    report = sdm.explain(Chain(in_place).eval(), torch.randn(5, 64))
    # The names are the plan's, with no trace of the wrapper.
    assert [layer.name for layer in report.layers] == [f"blocks.{i}.fc{j}" for i in range(3) for j in (1, 2)] + ["head"]
    assert report["blocks.0.fc1"].kernel == "cpu"
    assert report["blocks.1.fc1"].reason == "rule 'blocks.1.fc1'"
    assert report["head"].kernel == "not run"  # no graph of ours has it
    assert report.graphs == 2


def test_patterns_after_a_switch(image):
    model = sparse_net()
    compiled = torch.compile(model, backend="sparsedm", options=FORCED)
    assert sdm.explain(compiled, image)["conv"].pattern == "2:4"
    sdm.set_pattern(model, "1:4")
    assert sdm.explain(compiled, image)["conv"].pattern == "1:4"
    sdm.set_pattern(model, "dense")
    assert sdm.explain(compiled, image)["conv"].pattern == "dense"


def test_a_packed_model(image):
    model = sparse_net()
    sdm.pack(model)
    report = sdm.explain(torch.compile(model, backend="sparsedm"), image)
    assert sorted(layer.name for layer in report.layers) == sorted(NAMES)
    assert (report["conv"].kernel, report["conv"].pattern, report["conv"].reason[:7]) == ("cpu", "2:4", "packed;")
    assert report["unused"].kernel == "not run"


def test_a_graph_that_trains(image):
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sparse_net()

        def forward(self, x):
            with torch.enable_grad():
                return self.step(x)

        def step(self, x):
            torch._dynamo.graph_break()
            return self.net(x)

    report = sdm.explain(torch.compile(Guided(), backend="sparsedm", options=FORCED), image)
    assert report.mode in ("training", "mixed")
    assert "training graph" in report["net.conv"].reason
    assert report["net.conv"].kernel == "dense"


def test_tied_weights(image):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    sdm.sparsify(model, "2:4")
    report = sdm.explain(torch.compile(model, backend="sparsedm", options=FORCED), torch.randn(4, 64))
    assert [layer.kernel for layer in report.layers] == ["cpu", "cpu"]
    assert [layer.calls for layer in report.layers] == [2, 0]


def test_attention_modules_are_listed_with_their_reason():
    model = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    sdm.sparsify(model, "2:4", policy="all")
    report = sdm.explain(model, torch.randn(2, 5, 64))
    assert "one parameter" in report["self_attn"].reason
    assert {layer.name for layer in report.layers} == {"self_attn", "self_attn.out_proj", "linear1", "linear2"}


def test_keyword_inputs(image):
    compiled = torch.compile(sparse_net(), backend="sparsedm", options=FORCED)
    assert sdm.explain(compiled, x=image)["conv"].kernel == "cpu"


def test_leaves_grad_mode_and_training_flag_alone(image):
    model = sparse_net()
    sdm.explain(torch.compile(model, backend="sparsedm", options=FORCED), image)
    assert torch.is_grad_enabled()
    assert not model.training


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_another_backend_is_an_error(image, backend):
    with pytest.raises(ValueError, match="no graph of backend 'sparsedm' ran"):
        sdm.explain(torch.compile(sparse_net(), backend=backend), image)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        sdm.explain(lambda x: x, torch.randn(2, 64))


def test_meta():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"'conv\.weight' is on meta"):
        sdm.explain(model, torch.randn(3, 32, 8, 8))


def test_errors_of_the_model_pass_through():
    with pytest.raises(Exception, match=r"33|shape|channels"):
        sdm.explain(sparse_net(), torch.randn(3, 33, 8, 8))
