"""Choosing masks by what a layer computes on calibration data, and not by the size of its weights alone."""

from sparsedm_compile.selection.report import LayerSelection, SelectionReport
from sparsedm_compile.selection.select import select_masks

__all__ = ["LayerSelection", "SelectionReport", "select_masks"]
