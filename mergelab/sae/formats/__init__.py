"""Files of finished SAEs: the library's own, and those of other libraries."""

from mergelab.sae.formats.detect import FORMATS, load_sae, reserve, save_sae

__all__ = ["FORMATS", "load_sae", "reserve", "save_sae"]
