"""Maps f between reading a vector and writing it."""

from patchscopes.maps.affine import Affine
from patchscopes.maps.files import load_map, save_map
from patchscopes.maps.identity import Identity
from patchscopes.maps.map import Map, digest_of
from patchscopes.maps.scale import Scale

__all__ = ["Affine", "Identity", "Map", "Scale", "digest_of", "load_map", "save_map"]
