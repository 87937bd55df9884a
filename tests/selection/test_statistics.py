import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsedm_compile.calibration import CalibrationBatch
from sparsedm_compile.selection import statistics
from sparsedm_compile.selection.statistics import input_grams, mean_squares, output_error


def calibration(*inputs: torch.Tensor) -> list[CalibrationBatch]:
    return [CalibrationBatch((x,), x) for x in inputs]


def gram_by_loops(rows: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for row in rows.double():
        total += torch.outer(row, row)
    return total


class TestGrams:
    @settings(deadline=None, max_examples=25)
    @given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), width=st.integers(1, 6))
    def test_linear_over_several_batches(self, sizes, width):
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        xs = [torch.randn(size, 3, width) for size in sizes]
        grams = input_grams(model, {"a": [model[0]], "b": [model[2]]}, calibration(*xs))
        rows = torch.cat(xs).reshape(-1, width)
        torch.testing.assert_close(grams["a"][0], gram_by_loops(rows))
        # Batch by batch, as the model saw them: in float32 the rounding of a product depends on its shape.
        hidden = torch.cat([model[:2](x).detach() for x in xs]).reshape(-1, width)
        torch.testing.assert_close(grams["b"][0], gram_by_loops(hidden))

    def test_mean_squares_are_the_diagonal_by_rows(self):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
        xs = [torch.randn(2, 4, 5, 6), torch.randn(1, 4, 5, 6)]
        layers = {"a": [model[0]], "b": [model[2]]}
        grams, squares = input_grams(model, layers, calibration(*xs)), mean_squares(model, layers, calibration(*xs))
        for name, gram in grams.items():
            torch.testing.assert_close(squares[name], gram.diagonal(dim1=1, dim2=2) / (3 * 5 * 6))

    @pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
    def test_conv2d_by_cutting_out_patches(self, chunk, monkeypatch):
        monkeypatch.setattr(statistics, "_CHUNK", chunk)
        conv = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=1, groups=2)
        x = torch.randn(3, 4, 5, 6)
        padded = F.pad(x, (1, 1, 1, 1))
        (grams,) = input_grams(conv, {"": [conv]}, calibration(x)).values()
        for group in range(2):
            rows = [
                padded[b, 2 * group : 2 * group + 2, i : i + 2, j : j + 3].permute(1, 2, 0).flatten()
                for b in range(3)
                for i in range(6)
                for j in range(0, 6, 2)
            ]
            torch.testing.assert_close(grams[group], gram_by_loops(torch.stack(rows)))

    def test_layers_that_share_a_weight_add_up_and_calls_do(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(input=self.a(self.a(x)))  # also by keyword

        model, x = Twice(), torch.randn(5, 3)
        grams = input_grams(model, {"a": [model.a, model.b]}, calibration(x))
        seen = [x, model.a(x), model.a(model.a(x))]
        torch.testing.assert_close(grams["a"][0], gram_by_loops(torch.cat(seen).detach()))

    def test_conv2d_without_a_batch_dimension(self):
        conv, x = nn.Conv2d(2, 2, 2), torch.randn(2, 4, 4)
        one = input_grams(conv, {"": [conv]}, calibration(x))[""]
        assert torch.equal(one, input_grams(conv, {"": [conv]}, calibration(x[None]))[""])

    def test_directions_that_hardly_vary_are_not_lost_beside_large_ones(self):
        """In float32 the small difference of two inputs a thousand times its size is gone."""
        layer = nn.Linear(2, 1)
        common, small = 1e3 * torch.randn(500, dtype=torch.float64), 1e-2 * torch.randn(500, dtype=torch.float64)
        x = torch.stack([common, common + small], 1).float()
        gram = input_grams(layer, {"": [layer]}, calibration(x))[""][0]
        exact = (x[:, 0].double() - x[:, 1].double()).square().sum()
        along = torch.tensor([1.0, -1.0], dtype=torch.float64)
        assert (along @ gram @ along).item() == pytest.approx(exact.item(), rel=1e-3)

    def test_errors_and_hooks_are_gone(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        spare = nn.Linear(3, 3)
        with pytest.raises(ValueError, match=r"layer 'spare' is not called .*rules=\{\"spare\": \"dense\"\}"):
            input_grams(model, {"0": [model[0]], "spare": [spare]}, calibration(torch.ones(1, 3)))
        with torch.no_grad():
            model[0].bias[0] = float("inf")
        with pytest.raises(ValueError, match="layer '1' sees inputs that are not finite"):
            input_grams(model, {"1": [model[1]]}, calibration(torch.ones(1, 3)))
        with pytest.raises(RuntimeError, match="invalid for input of size 4"):
            input_grams(model, {"0": [model[0]]}, calibration(torch.ones(1, 4)))
        assert not any(module._forward_pre_hooks for module in (*model, spare))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 9), out=st.integers(1, 3), width=st.integers(1, 5))
def test_output_error_is_that_of_the_outputs(rows, out, width):
    x, w, v = (torch.randn(*s, dtype=torch.float64) for s in ((2, rows, width), (2, out, width), (2, out, width)))
    by_hand = ((x @ w.mT - x @ v.mT).norm() / (x @ w.mT).norm()).item()
    assert output_error(x.mT @ x, w, v) == pytest.approx(by_hand, rel=1e-9)
    assert output_error(x.mT @ x, w, w) == 0
