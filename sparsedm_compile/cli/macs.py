"""``sparsedm macs``: what a pattern saves, from shapes alone."""

from sparsedm_compile.cli.common import (
    BatchOption,
    ConfigOption,
    JsonOption,
    ModelArgument,
    PatternOption,
    PolicyOption,
    RuleOption,
    parse_rules,
    result_only,
    set_up,
    show,
    stderr,
    user_errors,
)
from sparsedm_compile.macs import count_macs
from sparsedm_compile.model_spec import load_model
from sparsedm_compile.planning import make_plan


def macs(
    model: ModelArgument,
    pattern: PatternOption = "2:4",
    policy: PolicyOption = "default",
    rule: RuleOption = None,
    batch: BatchOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count multiply-accumulates, parameters and bytes per layer. Allocates no weights: any model in seconds."""
    set_up(seed=0)
    with result_only(as_json), user_errors(), stderr.status("counting"):
        loaded = load_model(model, batch=batch, config=config, device="meta")
        plan = make_plan(loaded.model, pattern, policy, parse_rules(rule))
        report = count_macs(loaded.model, *loaded.inputs, plan=plan, **loaded.kwargs)
    show(report, as_json)
