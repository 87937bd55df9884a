"""Tables as text: what prints through rich also prints with plain ``print``."""

import io

from rich.console import Console

# Wide enough that no column of the widest table (explain) wraps; terminals get their own width through __rich__.
_TEXT_WIDTH = 160


class RichText:
    """Gives a class with ``__rich__`` a ``__str__`` of the same look."""

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=_TEXT_WIDTH, color_system=None).print(self)
        return buffer.getvalue().rstrip("\n")


def summary_line(part: int, whole: int, what: str) -> str:
    """``"36 of 49 layers sparse"``."""
    return f"{part} of {whole} {what}"


def milliseconds(value: float | None) -> str:
    """A time in ms for a table cell; empty where nothing was measured."""
    return "" if value is None else f"{value:.3f}"
