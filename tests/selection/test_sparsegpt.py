import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.selection import sparsegpt as module
from sparsedm_compile.selection.naive import sparsegpt_naive
from sparsedm_compile.selection.refit import least_squares
from sparsedm_compile.selection.sparsegpt import inverse_factor, sparsegpt
from sparsedm_compile.selection.wanda import wanda_score

patterns = st.sampled_from(
    [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(2, 4, 2), Pattern(1, 2, 4), Pattern(5, 8)]
)
seeds = st.integers(0, 10_000)


def correlated(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs of which each is in part the sum of others: what compensation lives on."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    mix = mix / columns**0.5 + torch.eye(columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ mix


def problem(out: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = correlated(3 * columns, columns, seed)
    w = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return w, x.T @ x / len(x)


def squared_error(hessian: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of the outputs of each row."""
    root = torch.linalg.cholesky(hessian)  # hessian = root @ root.T, so |root.T d|^2 = d' hessian d
    return ((w - v) @ root).square().sum(1)


def error_of(hessian: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> float:
    return squared_error(hessian, w, v).sum().item()


class TestAgainstTheDefinition:
    @settings(deadline=None, max_examples=40)
    @given(
        pattern=patterns,
        groups=st.integers(1, 3),
        blocks=st.integers(1, 2),
        block=st.sampled_from([1, 8, 128]),
        seed=seeds,
    )
    def test_equals_the_oracle_for_any_shape_and_block(self, pattern, groups, blocks, block, seed):
        w, hessian = problem(pattern.v * blocks, pattern.m * groups, seed)
        damped = hessian + 0.01 * torch.eye(len(hessian))
        kept, solution = sparsegpt_naive(w, damped, pattern)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK", block)
            mask, fast = sparsegpt(w, inverse_factor(hessian, 0.01)[0], pattern)
        assert torch.equal(mask, kept)
        torch.testing.assert_close(fast, solution, rtol=1e-7, atol=1e-9)

    @settings(deadline=None, max_examples=30)
    @given(seed=seeds)
    def test_one_dropped_weight_of_a_group_is_the_best_by_least_squares(self, seed):
        """Every column is tried, and those to its right are solved for by a general least-squares solver."""
        x = correlated(12, 4, seed)
        w = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        errors, solutions = [], []
        for dropped in range(4):
            v = w.clone()
            v[0, dropped] = 0
            later = x[:, dropped + 1 :]
            if later.shape[1]:
                v[0, dropped + 1 :] += torch.linalg.lstsq(later, x[:, dropped] * w[0, dropped]).solution
            errors.append((x @ (w - v)[0]).square().sum().item())
            solutions.append(v)
        mask, solution = sparsegpt(w, inverse_factor(x.T @ x, 1e-12)[0], Pattern(3, 4))
        best = min(range(4), key=errors.__getitem__)
        assert mask[0].tolist() == [column != best for column in range(4)]
        torch.testing.assert_close(solution, solutions[best], rtol=1e-5, atol=1e-7)

    @settings(deadline=None, max_examples=30)
    @given(pattern=patterns, seed=seeds)
    def test_uncorrelated_inputs_are_wandas_choice_without_compensation(self, pattern, seed):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(4, 8, generator=generator, dtype=torch.float64)
        hessian = torch.diag(torch.rand(8, generator=generator, dtype=torch.float64) + 0.1)
        mask, solution = sparsegpt(w, inverse_factor(hessian, 1e-12)[0], pattern)
        assert torch.equal(solution, w.masked_fill(~mask, 0))
        if pattern.v == 1:  # with more rows Wanda adds magnitudes, the second order their squares
            assert torch.equal(mask, magnitude_mask(wanda_score(w, hessian), pattern))

    @pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4)], ids=str)
    def test_lies_between_the_best_of_all_masks_and_wanda(self, pattern):
        """One group, every mask, each solved exactly."""
        totals = dict.fromkeys(("best", "refitted", "sparsegpt", "wanda", "magnitude"), 0.0)
        for seed in range(60):
            w, hessian = problem(1, 4, seed)
            best = float("inf")
            for keep in map(list, itertools.combinations(range(4), pattern.n)):
                v = torch.zeros_like(w)
                v[0, keep] = torch.linalg.solve(hessian[keep][:, keep], hessian[keep] @ w[0])
                best = min(best, squared_error(hessian, w, v).item())
            mask, solution = sparsegpt(w, inverse_factor(hessian, 1e-9)[0], pattern)
            errors = {
                "best": best,
                "refitted": error_of(hessian, w, least_squares(w, mask, hessian, 1e-9, solution)),
                "sparsegpt": error_of(hessian, w, solution),
                "wanda": error_of(hessian, w, w * magnitude_mask(wanda_score(w, hessian), pattern)),
                "magnitude": error_of(hessian, w, w * magnitude_mask(w, pattern)),
            }
            assert errors["best"] <= errors["refitted"] * (1 + 1e-6) <= errors["sparsegpt"] * (1 + 2e-6)
            totals = {name: total + errors[name] for name, total in totals.items()}
        assert list(totals.values()) == sorted(totals.values())

    @pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4)], ids=str)
    def test_its_mask_allows_smaller_errors_than_others(self, pattern):
        """Each mask with its least-squares weights; one layer of 64 inputs and 32 outputs."""
        w, hessian = problem(32, 64, 0)
        masks = {
            "sparsegpt": sparsegpt(w, inverse_factor(hessian, 1e-3)[0], pattern)[0],
            "wanda": magnitude_mask(wanda_score(w, hessian), pattern),
            "magnitude": magnitude_mask(w, pattern),
        }
        errors = {
            name: error_of(hessian, w, least_squares(w, mask, hessian, 1e-9, w * mask)) for name, mask in masks.items()
        }
        assert errors["sparsegpt"] < 0.95 * min(errors["wanda"], errors["magnitude"])


class TestFactor:
    @settings(deadline=None, max_examples=20)
    @given(columns=st.integers(1, 9), seed=seeds)
    def test_is_of_the_damped_inverse(self, columns, seed):
        _, hessian = problem(1, columns, seed)
        factor, damping = inverse_factor(hessian, 0.5)
        assert damping == 0.5
        assert torch.equal(factor, factor.triu())
        identity = torch.eye(columns, dtype=torch.float64)
        torch.testing.assert_close(factor.T @ factor @ (hessian + 0.5 * identity), identity, rtol=1e-8, atol=1e-8)

    def test_damping_grows_until_a_singular_matrix_has_one(self):
        ones = torch.ones(6, 6, dtype=torch.float64)
        factor, damping = inverse_factor(ones, 1e-30)
        assert 1e-30 < damping < 1e-10
        assert torch.isfinite(factor).all()


class TestLeastSquares:
    @settings(deadline=None, max_examples=40)
    @given(pattern=patterns, groups=st.integers(1, 3), damping=st.sampled_from([1e-3, 0.1]), seed=seeds)
    def test_equals_a_general_solver_row_by_row(self, pattern, groups, damping, seed):
        out, columns = 2 * pattern.v, pattern.m * groups
        x = correlated(3 * columns, columns, seed)
        w = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        kept = magnitude_mask(w, pattern)
        solution = least_squares(w, kept, x.T @ x, damping, w.masked_fill(~kept, 0))
        # |X (v - w)|^2 + damping |v - w|^2, as one tall system
        tall = torch.cat([x, damping**0.5 * torch.eye(columns, dtype=torch.float64)])
        for row in range(out):
            keep = kept[row].nonzero()[:, 0]
            exact = torch.linalg.lstsq(tall[:, keep], tall @ w[row]).solution
            torch.testing.assert_close(solution[row, keep], exact, rtol=1e-4, atol=1e-5)
        assert not solution[~kept].any()

    def test_a_row_that_is_exact_from_the_start_stays_beside_one_that_is_not(self):
        w, hessian = problem(2, 8, 0)
        w[0, 4:] = 0
        kept = torch.arange(8).expand(2, 8) < 4
        solution = least_squares(w, kept, hessian, 1e-6, w.masked_fill(~kept, 0))
        assert torch.equal(solution[0], w[0])
        assert squared_error(hessian, w, solution)[1] < squared_error(hessian, w, w.masked_fill(~kept, 0))[1]

    def test_nothing_to_do(self):
        hessian = torch.zeros(4, 4, dtype=torch.float64)
        zeros = torch.zeros(2, 4, dtype=torch.float64)
        assert torch.equal(least_squares(zeros, zeros.bool(), hessian, 1e-3, zeros), zeros)
