"""Maps f between reading a vector and writing it."""

from patchscopes.maps.affine import Affine
from patchscopes.maps.files import load_map, save_map
from patchscopes.maps.identity import Identity
from patchscopes.maps.map import Map
from patchscopes.maps.scale import Scale

__all__ = ["Affine", "Identity", "Map", "Scale", "load_map", "save_map"]
