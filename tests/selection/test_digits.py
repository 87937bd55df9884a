import pytest
import torch

from sparsedm_compile.calibration import calibration_set
from sparsedm_compile.demo.digits import load_digits, load_model
from sparsedm_compile.selection import select_masks
from sparsedm_compile.sparsify import sparsify


@pytest.fixture(scope="module")
def losses():
    """Denoising loss on held-out images, one-shot, of the demo's model: dense and 1:4 after each way of selecting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train, test = load_digits()
    calibration = calibration_set([train], samples=64)
    (held_out,) = calibration_set([test], samples=200, batch=200, seed=1)

    def loss(*selection) -> float:
        model = load_model()
        if selection:
            sparsify(model, "1:4", policy="sparsedm")
            method, refit = selection
            select_masks(model, calibration, method, refit=refit, progress=False)
        with torch.no_grad():
            return (model(*held_out.inputs) - held_out.noise).square().mean().item()

    yield {
        "dense": loss(),
        "magnitude": loss("magnitude", False),
        "wanda": loss("wanda", False),
        "sparsegpt": loss("sparsegpt", False),
        "refitted": loss("sparsegpt", True),
    }
    torch.set_num_threads(threads)


def test_each_method_recovers_more_of_the_dense_model(losses):
    assert losses["wanda"] < 0.9 * losses["magnitude"]
    assert losses["sparsegpt"] < 0.6 * losses["wanda"]
    assert losses["refitted"] < 0.9 * losses["sparsegpt"]
    assert losses["dense"] < losses["refitted"] < 1.25 * losses["dense"]
