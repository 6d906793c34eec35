"""Files of finished dictionaries: the library's own, and those of other libraries."""

from mergelab.sae.formats.detect import FORMATS, load_dictionary, reserve, save_dictionary

__all__ = ["FORMATS", "load_dictionary", "reserve", "save_dictionary"]
