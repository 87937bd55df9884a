import io
import json
import sys
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import linalg

from sparsedm_compile.demo import digits, run_demo
from sparsedm_compile.demo.frechet import pixel_frechet_distance
from sparsedm_compile.demo.pretrain import main as pretrain_main
from sparsedm_compile.images import sample_figure
from sparsedm_compile.noise import VPSDE


class TestDigits:
    def test_split_is_of_all_images_and_in_range(self):
        train, test = digits.load_digits()
        assert train.shape == (1297, 1, 8, 8)
        assert test.shape == (500, 1, 8, 8)
        assert (train.min(), train.max()) == (-1, 1)
        together = torch.cat([train, test]).flatten(1)
        from sklearn.datasets import load_digits

        original = torch.from_numpy(load_digits().data).float() / 8 - 1
        assert torch.equal(together.sort(dim=0).values, original.sort(dim=0).values)

    def test_checkpoint_is_small_and_predicts_noise(self):
        packaged = resources.files("sparsedm_compile") / "data" / "digits-uvit.safetensors"
        assert len(packaged.read_bytes()) < 3_000_000
        model = digits.load_model()  # strict
        assert not model.training
        assert model.pos_embed.dtype == torch.float32
        _, test = digits.load_digits()
        process, generator = VPSDE(), torch.Generator().manual_seed(0)
        t, noise = process.sample_times(500, generator=generator), torch.randn(test.shape, generator=generator)
        with torch.no_grad():
            prediction = process.predict_noise(model, process.perturb(test, t, noise), t)
        assert (prediction - noise).square().mean() < 0.11  # predicting 0 gives 1

    def test_pretraining_writes_a_checkpoint_that_loads(self, tmp_path, capsys):
        path = tmp_path / "model.safetensors"
        pretrain_main(["--out", str(path), "--steps", "2", "--seed", "5"])
        assert "mean loss of the last 2 steps" in capsys.readouterr().out
        again = tmp_path / "again.safetensors"
        pretrain_main(["--out", str(again), "--steps", "2", "--seed", "5"])
        assert path.read_bytes() == again.read_bytes()
        assert digits.load_model(path).pos_embed.abs().sum() > 0


class TestDistance:
    def test_equals_the_formula_with_scipys_matrix_root(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 1, 3, 3, generator=generator)
        y = 0.5 + torch.randn(200, 9, generator=generator).mul(torch.arange(1, 10)).view(200, 1, 3, 3)
        a, b = x.flatten(1).double().numpy(), y.flatten(1).double().numpy()
        cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = linalg.sqrtm(cov_a @ cov_b).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
        assert pixel_frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
        assert pixel_frechet_distance(y, x) == pytest.approx(expected, rel=1e-8)

    def test_constant_pixels_do_no_harm(self):
        x = torch.randn(50, 1, 4, 4)
        x[..., 0] = 0.25
        assert pixel_frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
        assert pixel_frechet_distance(x, x + 2) == pytest.approx(16 * 4, rel=1e-6)

    def test_errors(self):
        x = torch.zeros(4, 1, 2, 2)
        with pytest.raises(ValueError, match=r"\(4, 1, 2, 2\) and \(4, 1, 2, 3\)"):
            pixel_frechet_distance(x, torch.zeros(4, 1, 2, 3))
        with pytest.raises(ValueError, match="at least 2 images"):
            pixel_frechet_distance(x[:1], x)
        with pytest.raises(ValueError, match="not finite"):
            pixel_frechet_distance(x / 0, x)


def test_picture_shows_each_row(tmp_path):
    rows = {"black": -torch.ones(5, 1, 8, 8), "white": torch.ones(5, 1, 8, 8)}
    sample_figure(rows, columns=5).savefig(tmp_path / "p.png", dpi=120)
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("L")).astype(float)
    height, width = pixels.shape
    upper, lower = pixels[: height // 2, width // 3 :], pixels[height // 2 :, width // 3 :]
    assert upper.mean() < 100 < 200 < lower.mean()


def test_demo_end_to_end(tmp_path):
    result = run_demo(tmp_path / "out", seconds=2, samples=64, sampling_steps=5, speed=False, progress=False)
    dense, one_shot, tuned = result.rows
    assert [row.name for row in result.rows] == ["dense", "one-shot 2:4", "fine-tuned 2:4"]
    assert one_shot.macs == tuned.macs < dense.macs
    assert one_shot.weight_bytes == tuned.weight_bytes < 0.75 * dense.weight_bytes
    assert dense.denoising_loss < tuned.denoising_loss < one_shot.denoising_loss
    assert dense.distance < one_shot.distance
    assert result.finetune_steps >= 1
    assert result.speed is None

    console = Console(file=io.StringIO(), width=120)
    console.print(result)
    text = console.file.getvalue()
    for word in ("dense", "one-shot 2:4", "fine-tuned 2:4", "pixel Fréchet distance", "real (train)"):
        assert word in text
    assert "FID" not in text

    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert report == result.to_dict() | {"rows": [vars(row) for row in result.rows]}
    with Image.open(tmp_path / "out" / "samples.png") as image:
        image.load()
        assert image.width > image.height


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"sampling_steps": 1}, "sampling_steps must be at least 2, got 1"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "project"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_extra_is_named_before_any_work(monkeypatch, tmp_path, module, project):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs {project}: pip install 'sparsedm-compile\[demo\]'"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
