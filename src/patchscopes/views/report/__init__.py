"""A run as one HTML file that opens anywhere, offline: `report`."""

from patchscopes.views.report.page import report

__all__ = ["report"]
