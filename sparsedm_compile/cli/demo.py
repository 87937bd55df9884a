"""``sparsedm demo``: from a dense checkpoint to a fine-tuned, compiled 2:4 model."""

from pathlib import Path
from typing import Annotated

import typer

from sparsedm_compile.cli.common import (
    JsonOption,
    SeedOption,
    ThreadsOption,
    check_place,
    result_only,
    set_up,
    show,
    user_errors,
)
from sparsedm_compile.demo import run_demo


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for samples.png and demo.json.")] = Path("demo-output"),
    seconds: Annotated[float, typer.Option("--seconds", help="Of fine-tuning.")] = 60.0,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a small pretrained U-ViT 2:4 sparse, fine-tune, compile and sample it; compare with dense. A few minutes."""
    set_up(seed, threads)
    with result_only(as_json), user_errors():
        check_place("--out", out, folder=True)
        result = run_demo(out, seconds=seconds, seed=seed)
    show(result, as_json)
