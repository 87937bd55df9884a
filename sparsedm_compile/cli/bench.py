"""``sparsedm bench``: a whole model against the best dense compilation."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsedm_compile.benchmarking import bench_model
from sparsedm_compile.cli.common import (
    BatchOption,
    CheckpointOption,
    ConfigOption,
    JsonOption,
    ModelArgument,
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
from sparsedm_compile.model_spec import load_model
from sparsedm_compile.planning import make_plan


def bench(
    model: ModelArgument,
    pattern: Annotated[list[str] | None, typer.Option("--pattern", help="Repeatable; 2:4 unless given.")] = None,
    policy: PolicyOption = "default",
    rule: RuleOption = None,
    batch: BatchOption = None,
    config: ConfigOption = None,
    checkpoint: CheckpointOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="Of timing, after the compilations.")] = 15.0,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a model at each pattern against the faster of Inductor and Inductor with freezing, in turn."""
    set_up(seed, threads)
    patterns, rules = pattern or ["2:4"], {}
    with result_only(as_json), stderr.status("loading") as status:
        with user_errors():
            rules = parse_rules(rule)
            loaded = load_model(model, batch=batch, config=config, checkpoint=checkpoint)
            for one in patterns:
                make_plan(loaded.model, one, policy, rules)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
        report = bench_model(
            loaded.model,
            loaded.inputs,
            loaded.kwargs,
            patterns=patterns,
            policy=policy,
            rules=rules,
            seconds=seconds,
            name=loaded.name,
            progress=status.update,
        )
    if out is not None:
        out.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    show(report, as_json)
