"""Files of finished SAEs: the library's own, and those of other libraries."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.sae.formats.cross_layer import load_cross_layer_transcoder
    from mergelab.sae.formats.detect import FORMATS, FileFormat, load_sae, reserve, save_sae
    from mergelab.sae.formats.hook_names import hook_of, site_of
    from mergelab.sae.formats.releases import ReleasedSAE, find_release, sae_path, sae_releases

__all__ = [
    "FORMATS",
    "FileFormat",
    "ReleasedSAE",
    "find_release",
    "hook_of",
    "load_cross_layer_transcoder",
    "load_sae",
    "reserve",
    "sae_path",
    "sae_releases",
    "save_sae",
    "site_of",
]

__getattr__, __dir__ = lazy_names(__name__)
