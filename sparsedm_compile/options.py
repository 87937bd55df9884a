"""The options of ``torch.compile(backend="sparsedm", options={...})``, parsed into one dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparsedm_compile.pattern import Pattern
from sparsedm_compile.planning import Rules
from sparsedm_compile.policy import LayerPolicy, check_policy


@dataclass(frozen=True)
class Options:
    """What a user may ask of the backend.

    Attributes:
        pattern: for a plain dense model: mask its layers with this pattern. A sparsified model has its own.
        policy: which layers that concerns; as in ``sparsify``.
        rules: as in ``sparsify``.
        kernel: ``"auto"`` measures per layer; the name of a kernel, or ``"dense"``, forces it where it can run.
        train_kernel: what multiplies in the forward of a training graph: ``"dense"``, or ``"cusparselt"`` for masked
            linear layers that fit into 2:4, in bfloat16 or float16 (weights or autocast) on a GPU. Their weights are
            compressed at each call; the backward is dense. Not measured on a GPU.
        dump_graphs: a directory; the graph before and after each pass is written there.
        dump_pass: only around the pass of this name.
        inductor: options of Inductor's own, from ``mode`` and from every key that Inductor knows.
    """

    pattern: Pattern | None = None
    policy: str | LayerPolicy = "default"
    rules: Rules | None = None
    kernel: str = "auto"
    train_kernel: str = "dense"
    dump_graphs: Path | None = None
    dump_pass: str | None = None
    inductor: dict[str, Any] = field(default_factory=dict)


#: Kernels with a training forward.
TRAIN_KERNELS = ("dense", "cusparselt")
_OWN = tuple(f.name for f in fields(Options) if f.name != "inductor")


def parse_options(options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
    """Check and sort the options of ``torch.compile``.

    Raises:
        ValueError: an unknown key (the message names the valid ones), kernel, training kernel, pass, pattern or policy.
        TypeError: a value of the wrong type.
    """
    # Imported here: passes and kernels stand below the options of the backend but above the package's import.
    from torch._inductor import config, list_mode_options

    from sparsedm_compile.kernels import kernel_names
    from sparsedm_compile.passes import PASSES

    options = dict(options or {})
    inductor = dict(list_mode_options(mode)) if mode else {}
    known = config.get_config_copy()
    own = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in _OWN:
            own[name] = value
        elif name in known:
            inductor[name] = value
        else:
            raise ValueError(
                f"unknown option {key!r} for backend 'sparsedm': one of {', '.join(_OWN)}, or an option of Inductor"
            )

    if own.get("pattern") is not None:
        own["pattern"] = Pattern.parse(own["pattern"])
    else:
        idle = next((name for name in ("policy", "rules") if own.get(name) is not None), None)
        if idle is not None:
            raise ValueError(
                f"option {idle!r} needs 'pattern', the pattern to mask a plain dense model with; a sparsified model "
                "takes its policy and rules in sparsify(...)"
            )
    check_policy(own.get("policy", "default"))
    kernel = own.get("kernel", "auto")
    if kernel not in ("auto", "dense", *kernel_names()):
        raise ValueError(f"unknown kernel {kernel!r}: one of auto, dense, {', '.join(kernel_names())}")
    train_kernel = own.get("train_kernel", "dense")
    if train_kernel not in TRAIN_KERNELS:
        raise ValueError(f"unknown train_kernel {train_kernel!r}: one of {', '.join(TRAIN_KERNELS)}")
    dump_pass = own.get("dump_pass")
    if dump_pass is not None and dump_pass not in (p.__name__ for p in PASSES):
        raise ValueError(f"unknown pass {dump_pass!r}: one of {', '.join(p.__name__ for p in PASSES)}")
    if own.get("dump_graphs") is not None:
        own["dump_graphs"] = Path(own["dump_graphs"])
    elif dump_pass is not None:
        raise ValueError("option 'dump_pass' needs 'dump_graphs', the directory to write to")
    return Options(**own, inductor=inductor)
