"""``sparsedm bench``: time a model, render results, and hold two of them against each other."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsedm_compile.bench_report import compare as compare_results
from sparsedm_compile.bench_report import page, readme_block, replace_between_markers, write_results
from sparsedm_compile.bench_report.model_results import model_results
from sparsedm_compile.bench_report.plots import draw_plots
from sparsedm_compile.bench_report.results import read_folder, read_path
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
    check_place,
    fail,
    file_errors,
    parse_rules,
    result_only,
    set_up,
    show,
    stderr,
    user_errors,
)
from sparsedm_compile.model_spec import load_model
from sparsedm_compile.planning import make_plan

bench = typer.Typer(no_args_is_help=True, help="Time models, render results, find what became slower.")


@bench.command()
def model(
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
    out: Annotated[Path | None, typer.Option("--out", help="Also write a results file, for bench report.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time a model at each pattern against the faster of Inductor and Inductor with freezing, in turn."""
    set_up(seed, threads)
    patterns, rules = pattern or ["2:4"], {}
    with result_only(as_json), stderr.status("loading") as status:
        with user_errors():
            if out is not None:
                check_place("--out", out)
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
    show(report, as_json)
    if out is not None:
        with file_errors(out):
            write_results(out, model_results(report, out.stem, f"{loaded.name}, batch {batch or 1}, policy {policy}"))


@bench.command()
def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS_DIR", help="Folder of results files.")] = Path(
        "bench/results"
    ),
    out: Annotated[Path, typer.Option("--out", help="Folder for report.md and its plots.")] = Path("bench/report"),
    readme: Annotated[
        Path | None, typer.Option("--readme", help="Also rewrite this file between its results markers, in place.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Plots need matplotlib.")] = True,
) -> None:
    """Render results as a Markdown page with plots, and as the README's table; from the files alone."""
    with user_errors():
        check_place("--out", out, folder=True)
        found, others = read_folder(results)
        text = None if readme is None else replace_between_markers(readme.read_text(), readme_block(found))
        out.mkdir(parents=True, exist_ok=True)
        drawn = draw_plots(found, out / "plots") if plots else []
        (out / "report.md").write_text(page(found, [path.relative_to(out) for path in drawn]))
        if text is not None:
            readme.write_text(text)
    if others:
        stderr.print(f"not of this schema, left out: {', '.join(others)}")
    written = [out / "report.md", *drawn, *([] if readme is None else [readme])]
    sys.stdout.write("".join(f"{path}\n" for path in written))


@bench.command()
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A results file, or a folder of them.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Another.")],
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative change that is none.")] = 0.03,
    any_machine: Annotated[bool, typer.Option("--any-machine", help="Compare across machines all the same.")] = False,
    any_timing: Annotated[
        bool, typer.Option("--any-timing", help="Compare times taken warm with others all the same.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what got worse beyond tolerance and spread; exit status 1 if anything did."""
    with user_errors():
        comparison = compare_results(read_path(old), read_path(new), tolerance=tolerance)
    if comparison.machines and not any_machine:
        raise fail(
            f"measured on different machines ({' against '.join(comparison.machines)}), which says nothing about the "
            "code; --any-machine compares all the same"
        )
    if comparison.timed_otherwise and not any_timing:
        first, *others = comparison.timed_otherwise
        more = f" and {len(others)} more" if others else ""
        raise fail(
            f"marked as timed warm in one of {old} and {new} alone: {first}{more}, which says nothing about the code; "
            "measure the other one again with this version, or pass --any-timing to compare all the same"
        )
    show(comparison, as_json)
    raise typer.Exit(1 if comparison.regressions else 0)
