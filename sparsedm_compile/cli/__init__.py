"""The command line, ``sparsedm``: one command a file."""

import typer

from sparsedm_compile.cli.bench import bench
from sparsedm_compile.cli.demo import demo
from sparsedm_compile.cli.explain import explain
from sparsedm_compile.cli.macs import macs
from sparsedm_compile.cli.recipe import finetune, quality, train
from sparsedm_compile.cli.sample import sample

app = typer.Typer(
    help="N:M sparsity for pretrained diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, macs, explain, sample, train, finetune, quality):
    app.command()(command)
app.add_typer(bench, name="bench")
