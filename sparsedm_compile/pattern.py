"""The N:M sparsity pattern: how many of every m consecutive weights are kept."""

import re
from dataclasses import dataclass

# 32 is the coarsest group that SparseDM uses (31:32, 1:32); a position in a group then fits five bits.
MAX_M = 32
_SPELLING = re.compile(r"(\d+):(\d+)(?:v(\d+))?")


@dataclass(frozen=True, order=True)
class Pattern:
    """Of every ``m`` consecutive input features, ``n`` are kept; ``v`` adjacent output channels share one choice.

    Groups run along ``in_features`` of a linear weight and along ``C_in`` for each ``(c_out, *tap)`` of a convolution
    weight (SparseDM, arXiv 2404.10445, section 3). ``v > 1`` is vector-wise N:M (nmSPARSE, MLSys 2023): every ``2:4vX``
    is a valid 2:4. ``Pattern(1, 1)``, written ``"dense"``, keeps everything.

    Raises:
        TypeError: ``n``, ``m`` or ``v`` is not an int.
        ValueError: not ``1 <= n < m <= 32``, or ``v`` is not a power of two.
    """

    n: int
    m: int
    v: int = 1

    def __post_init__(self) -> None:
        for name in ("n", "m", "v"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"pattern: {name} must be an int, got {value!r}; write Pattern(2, 4) or '2:4'")
        if (self.n, self.m, self.v) == (1, 1, 1):
            return
        if self.n >= self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m}: n must be smaller than m; "
                "write 'dense' to keep everything"
            )
        if self.n < 1:
            raise ValueError(f"pattern {self.n}:{self.m} keeps nothing: n must be at least 1")
        if self.m > MAX_M:
            raise ValueError(f"pattern {self.n}:{self.m}: m must be at most {MAX_M}")
        if self.v < 1 or self.v & (self.v - 1):
            raise ValueError(f"pattern {self.n}:{self.m}v{self.v}: v must be a power of two (1, 2, 4, ...)")

    @classmethod
    def parse(cls, spelling: "str | Pattern") -> "Pattern":
        """Read ``"2:4"``, ``"2:4v4"`` or ``"dense"``; a ``Pattern`` is returned as it is.

        Raises:
            TypeError: neither a string nor a Pattern.
            ValueError: a spelling that is none of these, or numbers that make no pattern.
        """
        if isinstance(spelling, Pattern):
            return spelling
        if not isinstance(spelling, str):
            raise TypeError(f"pattern must be a string such as '2:4' or a Pattern, got {type(spelling).__name__}")
        if spelling == "dense":
            return DENSE
        match = _SPELLING.fullmatch(spelling)
        if match is None:
            raise ValueError(f"unknown pattern {spelling!r}: write 'n:m' ('2:4'), 'n:mvX' ('2:4v4') or 'dense'")
        n, m, v = (int(group) for group in match.groups(default="1"))
        if m == 1:  # "1:1" would slip through as the dense pattern
            raise ValueError(f"unknown pattern {spelling!r}: m must be at least 2; write 'dense' to keep everything")
        return cls(n, m, v)

    @property
    def is_dense(self) -> bool:
        """Whether this pattern keeps every weight."""
        return self.m == 1

    @property
    def density(self) -> float:
        """The share of the weights that is kept, n / m."""
        return self.n / self.m

    def refusal(self, weight_shape: tuple[int, ...], groups: int = 1) -> str | None:
        """Why a weight of this shape cannot take the pattern, or None if it can.

        Args:
            weight_shape: ``(out, in)`` of a linear weight, ``(C_out, C_in / groups, *kernel)`` of a convolution weight.
            groups: of the convolution; ``v`` channels that share a choice must lie in one group.
        """
        if self.is_dense:
            return None
        if len(weight_shape) < 2:
            return f"a weight of {len(weight_shape)} dimension(s) has no input features to group"
        out_features, in_features = weight_shape[0], weight_shape[1]
        if in_features % self.m:
            # The official code groups numel / m weights and so lets a group cross output rows here.
            return f"input width {in_features} is not a multiple of {self.m}"
        if (out_features // groups) % self.v:
            return f"output width {out_features // groups} is not a multiple of v = {self.v}"
        return None

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        return f"{self.n}:{self.m}" + (f"v{self.v}" if self.v > 1 else "")


DENSE = Pattern(1, 1)
