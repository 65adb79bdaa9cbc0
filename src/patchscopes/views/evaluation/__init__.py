"""What an experiment found (`evaluate.frame.Result`) as figures and as one HTML page."""

from patchscopes.views.evaluation.figures import draw, save_figures
from patchscopes.views.evaluation.page import page, write

__all__ = ["draw", "page", "save_figures", "write"]
