import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedm_compile.masks import magnitude_mask
from sparsedm_compile.pattern import Pattern
from sparsedm_compile.selection.wanda import wanda_score


def wanda_by_loops(weight: torch.Tensor, x: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The paper's definition: the norm of each input over all rows, scores one by one, the best n of each group."""
    norms = [sum(value.item() ** 2 for value in x[:, j]) ** 0.5 for j in range(x.shape[1])]
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(0, len(weight), pattern.v):
        for start in range(0, weight.shape[1], pattern.m):
            scores = {
                j: sum(abs(weight[r, j].item()) * norms[j] for r in range(row, row + pattern.v))
                for j in range(start, start + pattern.m)
            }
            best = sorted(scores, key=scores.get, reverse=True)[: pattern.n]
            kept[row : row + pattern.v, best] = True
    return kept


@settings(deadline=None, max_examples=40)
@given(
    pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(2, 4, 2), Pattern(4, 8, 4), Pattern(1, 3)]),
    blocks=st.integers(1, 2),
    groups=st.integers(1, 3),
    rows=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_equals_the_definition(pattern, blocks, groups, rows, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(blocks * pattern.v, groups * pattern.m, generator=generator, dtype=torch.float64)
    x = scale * torch.randn(rows, groups * pattern.m, generator=generator, dtype=torch.float64)
    mask = magnitude_mask(wanda_score(w, x.T @ x), pattern)
    assert torch.equal(mask, wanda_by_loops(w, x, pattern))


def test_a_loud_input_beats_a_large_weight():
    w, x = torch.tensor([[3.0, 2.0, 1.0, 0.1]]), torch.tensor([[1.0, 1.0, 10.0, 100.0]])
    assert magnitude_mask(w, "2:4").tolist() == [[True, True, False, False]]
    assert magnitude_mask(wanda_score(w, x.T @ x), "2:4").tolist() == [[False, False, True, True]]
