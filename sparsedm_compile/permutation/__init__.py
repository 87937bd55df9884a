"""Channel permutation: a model's channels reordered so that N:M masks keep more magnitude, its function unchanged."""

from sparsedm_compile.permutation.permute import permute_channels
from sparsedm_compile.permutation.report import AxisReport, LayerKept, PermutationReport

__all__ = ["AxisReport", "LayerKept", "PermutationReport", "permute_channels"]
