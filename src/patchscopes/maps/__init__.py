"""Maps f between reading a vector and writing it; fitting them, and their files."""

from patchscopes.maps.affine import Affine
from patchscopes.maps.by_layer import ByLayer
from patchscopes.maps.files import load_map, provenance_of, save_map
from patchscopes.maps.fit import FitReport, Fitted, evaluate, fit
from patchscopes.maps.identity import Identity
from patchscopes.maps.least_squares import Moments
from patchscopes.maps.low_rank import LowRank
from patchscopes.maps.map import LayeredMap, Map, digest_of, map_between
from patchscopes.maps.mean import Mean
from patchscopes.maps.noise import Noise
from patchscopes.maps.norm_match import NormMatch
from patchscopes.maps.per_direction import PerDirection
from patchscopes.maps.scale import Scale
from patchscopes.maps.zero import Zero

__all__ = [
    "Affine",
    "ByLayer",
    "FitReport",
    "Fitted",
    "Identity",
    "LayeredMap",
    "LowRank",
    "Map",
    "Mean",
    "Moments",
    "Noise",
    "NormMatch",
    "PerDirection",
    "Scale",
    "Zero",
    "digest_of",
    "evaluate",
    "fit",
    "load_map",
    "map_between",
    "provenance_of",
    "save_map",
]
