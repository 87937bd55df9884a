"""The options of the backend: one dataclass, unknown keys refused, Inductor's own passed on."""

from pathlib import Path

import pytest

from sparsedm_compile.options import Options, parse_options
from sparsedm_compile.pattern import Pattern


def test_defaults():
    assert parse_options() == parse_options({}) == Options()
    assert (Options().kernel, Options().train_kernel) == ("auto", "dense")
    assert Options().pattern is None


def test_own_options():
    got = parse_options({"pattern": "2:4v4", "policy": "all", "rules": {"a": "dense"}, "kernel": "reference"})
    assert got == Options(Pattern(2, 4, 4), "all", {"a": "dense"}, "reference")


def test_the_kernel_of_the_training_forward():
    assert parse_options({"train-kernel": "cusparselt"}) == Options(train_kernel="cusparselt")


def test_dashes_are_underscores(tmp_path):
    got = parse_options({"dump-graphs": str(tmp_path), "dump-pass": "swap_kernels"})
    assert (got.dump_graphs, got.dump_pass) == (Path(tmp_path), "swap_kernels")


def test_inductor_options_are_passed_on():
    got = parse_options({"epilogue_fusion": False, "cpp.threads": 1, "kernel": "dense"})
    assert got.inductor == {"epilogue_fusion": False, "cpp.threads": 1}
    assert got.kernel == "dense"


def test_modes_are_inductors():
    assert parse_options(mode="max-autotune-no-cudagraphs").inductor["max_autotune"] is True
    assert parse_options(mode="default").inductor == {}


def test_options_override_the_mode():
    assert parse_options({"max_autotune": False}, "max-autotune-no-cudagraphs").inductor["max_autotune"] is False


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"patern": "2:4"},
            ValueError,
            r"unknown option 'patern' for backend 'sparsedm': one of pattern, policy, rules",
        ),
        ({"inductor": {}}, ValueError, "unknown option 'inductor'"),
        ({"pattern": "2/4"}, ValueError, "unknown pattern '2/4'"),
        ({"pattern": 24}, TypeError, "pattern must be a string"),
        ({"pattern": "2:4", "policy": "none"}, ValueError, "unknown policy 'none': one of default"),
        ({"kernel": "triton9"}, ValueError, r"unknown kernel 'triton9': one of auto, dense, cpu"),
        ({"kernel": None}, ValueError, "unknown kernel None"),
        ({"train_kernel": "triton"}, ValueError, r"unknown train_kernel 'triton': one of dense, cusparselt$"),
        ({"train_kernel": None}, ValueError, "unknown train_kernel None"),
        ({"dump_pass": "swap_kernels"}, ValueError, "'dump_pass' needs 'dump_graphs'"),
        ({"dump_graphs": "x", "dump_pass": "no_pass"}, ValueError, r"unknown pass 'no_pass': one of find_layers"),
        ({"dump_graphs": 3}, TypeError, "int"),
        ({"rules": {"a": "dense"}}, ValueError, "option 'rules' needs 'pattern'"),
        ({"policy": "all"}, ValueError, "option 'policy' needs 'pattern'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        parse_options(options)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(RuntimeError, match=r"Unrecognized mode=fastest.*max-autotune"):
        parse_options(mode="fastest")
