"""What the demo needs beyond the package itself, checked before any work is done."""

from importlib.util import find_spec

_MODULES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def check_requirements() -> None:
    """Make sure that the packages of the extra ``demo`` are there.

    Raises:
        ImportError: one is missing; the message says how to install it.
    """
    missing = [project for module, project in _MODULES.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {' and '.join(missing)}: pip install 'sparsedm-compile[demo]'")
