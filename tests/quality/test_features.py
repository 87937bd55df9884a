"""Features: a classifier that learns, its files and their hashes; Inception with a stand-in for its weights."""

import hashlib
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from sparsedm_compile.quality.features import (
    Classifier,
    accuracy,
    classifier_features,
    inception_features,
    load_classifier,
    save_classifier,
    train_classifier,
)


def halves(count, seed=0):
    """Images bright in one half, labelled by which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    pixels = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    pixels[labels == 0, :, :4] += 1
    pixels[labels == 1, :, 4:] += 1
    return pixels, labels


@pytest.fixture(scope="module")
def trained():
    return train_classifier(*halves(512), epochs=2, batch=64, progress=False)


def test_it_learns_what_can_be_told_apart(trained):
    assert accuracy(trained, *halves(300, seed=1)) > 0.99


def test_a_seed_fixes_the_weights_and_leaves_the_global_one(trained):
    state = torch.get_rng_state()
    again = train_classifier(*halves(512), epochs=2, batch=64, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert classifier_features(again).sha256 == classifier_features(trained).sha256


def test_features_feed_the_last_layer_and_come_in_float64(trained):
    features = classifier_features(trained, halves(100, seed=2))
    images, _ = halves(700)
    values = features(images)
    assert values.dtype == torch.float64
    assert values.shape == (700, 128)
    expected = trained(images).double()
    assert torch.allclose(trained.head.double()(values), expected, atol=1e-4)
    trained.head.float()
    assert features.accuracy > 0.99


def test_files_hold_the_network_and_the_hash_tells_weights_apart(trained, tmp_path):
    save_classifier(trained, tmp_path / "c.safetensors")
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert classifier_features(loaded).sha256 == classifier_features(trained).sha256
    with torch.no_grad():
        loaded.head.bias += 1e-6
    assert classifier_features(loaded).sha256 != classifier_features(trained).sha256


def test_bad_input(tmp_path):
    images, labels = halves(64)
    with pytest.raises(ValueError, match="one label each, got 64 and 63"):
        train_classifier(images, labels[:63], batch=32)
    with pytest.raises(ValueError, match="at least 128 images"):
        train_classifier(images, labels)
    with pytest.raises(ValueError, match="two classes"):
        train_classifier(images, torch.zeros_like(labels), batch=32)
    with pytest.raises(FileNotFoundError, match="leave them out to use the small classifier"):
        inception_features(tmp_path / "missing.pth")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no classifier of this package"):
        load_classifier(tmp_path / "other.safetensors")


class StandIn(nn.Module):
    """What torch-fidelity's extractor is called with and answers, at one thousandth of the size."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.fc = nn.Linear(3, 5)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        assert images.dtype == torch.uint8
        return (self.fc(images.float().mean((2, 3))),)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(nn.Sequential(OrderedDict(fc=nn.Linear(3, 5))).state_dict(), tmp_path / "weights.pth")
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path / "weights.pth"


class TestInception:
    def test_pixels_go_in_as_bytes_and_the_hash_is_that_of_the_file(self, weights):
        features = inception_features(weights)
        images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
        state = torch.load(weights)
        grey = torch.tensor([0.0, 128.0, 255.0, 255.0]).unsqueeze(1).expand(4, 3)
        assert torch.equal(features(images), torch.nn.functional.linear(grey, *state.values()).double())
        assert (features.name, features.accuracy) == ("FID", None)
        assert features.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()

    def test_files_of_something_else(self, weights):
        torch.save({"fc.weight": torch.zeros(2, 3)}, weights)
        with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception-v3"):
            inception_features(weights)

    def test_code_in_a_file_is_not_run(self, weights, tmp_path):
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "run",)

        torch.save({"fc.weight": Evil()}, weights)
        with pytest.raises(ValueError, match="does not hold the weights"):
            inception_features(weights)
        assert not (tmp_path / "run").exists()

    def test_channels(self, weights):
        with pytest.raises(ValueError, match=r"1 or 3 channels, got \(2, 4, 8, 8\)"):
            inception_features(weights)(torch.zeros(2, 4, 8, 8))

    def test_without_torch_fidelity(self, weights, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
        with pytest.raises(ImportError, match="pip install torch-fidelity"):
            inception_features(weights)


def test_images_of_other_channels():
    with pytest.raises(ValueError, match=r"takes images \(N, 3, H, W\), got \(2, 1, 32, 32\)"):
        Classifier(3, 10).features(torch.zeros(2, 1, 32, 32))


def test_images_of_colour():
    assert Classifier(3, 10).features(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
