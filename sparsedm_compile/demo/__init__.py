"""The demo: from a dense checkpoint to a fine-tuned 2:4 model, with figures and pictures."""

from sparsedm_compile.demo.run import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
