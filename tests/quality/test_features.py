import pytest
import torch

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


def test_images_of_colour():
    assert Classifier(3, 10).features(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
