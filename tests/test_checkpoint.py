import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsedm_compile.checkpoint import load_sparse, save_sparse
from sparsedm_compile.pack import pack
from sparsedm_compile.sparsify import get_plan, set_pattern, sparsify, use_pattern


def dense(width=32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 4, width), nn.GELU(), nn.Linear(width, 6)
    ).eval()


def sparse() -> nn.Module:
    model = dense()
    sparsify(model, "2:4", policy=lambda layer: layer.name != "4" or "last", rules={"0": "1:4v2"})
    return model


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("freeze", [True, False])
def test_loading_gives_the_same_function_and_plan(tmp_path, freeze):
    model, twin = sparse(), dense()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    save_sparse(model, tmp_path / "model.safetensors", freeze=freeze)
    load_sparse(twin, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(twin(X), model(X))
    assert get_plan(twin).patterns() == get_plan(model).patterns()
    assert {layer.name: layer.switchable for layer in get_plan(twin)} == {"0": True, "2": True, "4": False}
    assert get_plan(twin)["4"].reason == "last"


def test_frozen_weights_serve_a_dense_model(tmp_path, masked_dense):
    """Whoever loads the file without this package computes what the sparse model computes."""
    model, plain = sparse(), dense()
    save_sparse(model, tmp_path / "model.safetensors")
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    reference = masked_dense(model)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name])
    assert model[2].weight.count_nonzero() == model[2].weight.numel()  # the model itself keeps its dense weights


def test_dense_weights_serve_every_pattern(tmp_path):
    model, twin = sparse(), dense()
    save_sparse(model, tmp_path / "model.safetensors", freeze=False)
    load_sparse(twin, tmp_path / "model.safetensors")
    for pattern in ("dense", "1:2", "2:4"):
        with use_pattern(model, pattern), use_pattern(twin, pattern), torch.no_grad():
            assert torch.equal(twin(X), model(X))


def test_a_dense_model_stays_dense(tmp_path):
    model, twin = dense(), dense()
    with torch.no_grad():
        model[2].weight.normal_()
    save_sparse(model, tmp_path / "model.safetensors")
    load_sparse(twin, tmp_path / "model.safetensors")
    assert torch.equal(twin[2].weight, model[2].weight)
    assert type(twin[2]) is nn.Linear


def test_into_a_model_of_the_same_plan(tmp_path):
    model = sparse()
    save_sparse(model, tmp_path / "model.safetensors")
    other = sparse()
    with torch.no_grad():
        other[2].weight.normal_()
    load_sparse(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


def test_shared_and_channels_last_weights(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    sparsify(model, "2:4", policy="all")
    save_sparse(model, tmp_path / "model.safetensors")
    load_sparse(twin, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(twin(torch.ones(16)), model(torch.ones(16)))
    convolution, other = (nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last) for _ in range(2))
    sparsify(convolution, "2:4", policy="all")
    save_sparse(convolution, tmp_path / "convolution.safetensors")
    load_sparse(other, tmp_path / "convolution.safetensors")
    assert torch.equal(other[0].weight != 0, convolution[0].weight.where(other[0].weight != 0, 0) != 0)


def test_an_embedding_tied_to_a_layer_is_not_masked(tmp_path):
    model = nn.ModuleDict({"tokens": nn.Embedding(16, 16), "out": nn.Linear(16, 16), "other": nn.Linear(16, 16)})
    model["out"].weight = model["tokens"].weight
    before = model["tokens"].weight.detach().clone()
    sparsify(model, "2:4", policy="all")
    save_sparse(model, tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["tokens.weight"], before)


class TestErrors:
    def refused(self, model, path, message, error=ValueError):
        before = copy.deepcopy(model.state_dict())
        kind = type(model[2])
        with pytest.raises(error, match=message):
            load_sparse(model, path)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert type(model[2]) is kind

    @pytest.fixture
    def path(self, tmp_path):
        save_sparse(sparse(), tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    def test_truncated(self, path):
        path.write_bytes(path.read_bytes()[:-10])
        self.refused(dense(), path, "is truncated, or no safetensors file")

    def test_one_bit(self, path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        self.refused(dense(), path, "is damaged: its tensors are not those that were saved")

    def test_another_model(self, path):
        self.refused(dense(64), path, r"'2\.weight' has shape \(32, 32\), the model has \(64, 32\)")

    def test_dtype(self, path):
        self.refused(dense().double(), path, r"layer '0' has torch\.float64 weights", TypeError)

    def test_not_finite(self, tmp_path):
        model = sparse()
        with torch.no_grad():
            model[2].weight[3, 5] = torch.nan
        save_sparse(model, tmp_path / "nan.safetensors", freeze=False)
        self.refused(dense(), tmp_path / "nan.safetensors", "layer '2' has weights that are not finite")

    def test_beyond_the_models_dtype(self, tmp_path):
        model = sparse()
        with torch.no_grad():
            model[2].weight[3, 5] = 1e30
        save_sparse(model, tmp_path / "large.safetensors", freeze=False)
        self.refused(dense().half(), tmp_path / "large.safetensors", "layer '2' has weights that are not finite")

    def test_tied_under_two_patterns(self, tmp_path):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
        twin = copy.deepcopy(model)
        twin[2].weight = twin[1].weight
        sparsify(model, "2:4", policy="all", rules={"2": "1:4"})
        save_sparse(model, tmp_path / "model.safetensors")
        self.refused(twin, tmp_path / "model.safetensors", r"'1' \(2:4\) and '2' \(1:4\) share one weight")

    def test_another_plan(self, path):
        model = sparse()
        set_pattern(model, "1:4")
        self.refused(
            model, path, r"has another plan than the model: layer '0' is 1:4v2 there and 1:4 here \(2 differ\)"
        )

    def test_without_a_plan(self, tmp_path):
        save_file(dense().state_dict(), tmp_path / "plain.safetensors")
        self.refused(dense(), tmp_path / "plain.safetensors", "holds no plan: load its weights with load_state_dict")

    def test_missing(self, tmp_path):
        self.refused(dense(), tmp_path / "none.safetensors", "does not exist", FileNotFoundError)

    def test_packed(self, tmp_path):
        model = sparse()
        pack(model)
        with pytest.raises(ValueError, match="model is packed: its dense weights are gone"):
            save_sparse(model, tmp_path / "model.safetensors")

    def test_a_failed_write_keeps_the_old_file(self, path, monkeypatch):
        before = path.read_bytes()

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"could not be written and is as it was before: .*No space left"):
            save_sparse(dense(), path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_metadata_is_readable(self, path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            plan = json.loads(file.metadata()["plan"])
        assert plan["2"] == {"pattern": "2:4", "reason": "", "switchable": True}
