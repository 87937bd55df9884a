"""``sparsedm explain``: which kernel runs each layer, and why."""

from typing import Annotated

import torch
import typer

from sparsedm_compile.cli.common import (
    BatchOption,
    CheckpointOption,
    ConfigOption,
    JsonOption,
    ModelArgument,
    PatternOption,
    PolicyOption,
    RuleOption,
    SeedOption,
    ThreadsOption,
    parse_rules,
    result_only,
    set_up,
    show,
    stderr,
    user_errors,
)
from sparsedm_compile.explain import explain as explain_model
from sparsedm_compile.model_spec import load_model
from sparsedm_compile.options import parse_options
from sparsedm_compile.sparsify import sparsify

KernelOption = Annotated[str, typer.Option("--kernel", help="auto measures per layer; a name forces that kernel.")]


def explain(
    model: ModelArgument,
    pattern: PatternOption = "2:4",
    policy: PolicyOption = "default",
    rule: RuleOption = None,
    kernel: KernelOption = "auto",
    batch: BatchOption = None,
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compile a model at a pattern, run it once, and tell for each layer: kernel, sparse and dense time, reason."""
    set_up(seed, threads)
    with result_only(as_json), stderr.status("loading") as status:
        with user_errors():
            parse_options({"kernel": kernel})
            loaded = load_model(model, batch=batch, config=config, checkpoint=checkpoint)
            sparsify(loaded.model, pattern, policy=policy, rules=parse_rules(rule))
        status.update("compiling, and timing the kernels of each layer")
        compiled = torch.compile(loaded.model, backend="sparsedm", options={"kernel": kernel})
        report = explain_model(compiled, *loaded.inputs, **loaded.kwargs)
    show(report, as_json)
