"""Files of finished dictionaries: the library's own, and those of other libraries."""

from mergelab.sae.formats.files import FORMATS, load_dictionary, reserve, save_dictionary

__all__ = ["FORMATS", "load_dictionary", "reserve", "save_dictionary"]
