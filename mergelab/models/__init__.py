"""Transformers as pure functions of parameters and tokens: families, loading, saving, sites, tables."""

from typing import TYPE_CHECKING

from mergelab.lazy import lazy_names

if TYPE_CHECKING:
    from mergelab.models.cache import Cache
    from mergelab.models.families import FAMILIES, model_from_config
    from mergelab.models.footprint import Footprint, Inventory, take_inventory
    from mergelab.models.further_tokens import FurtherLayer, load_further_layer
    from mergelab.models.load import load_model, load_params
    from mergelab.models.model import Architecture, Family, Model, Output, Params
    from mergelab.models.orbax import load_orbax, save_orbax
    from mergelab.models.residual_stream import ResidualWriter, norm_gain, readout, unembedding, writers
    from mergelab.models.save import save_model, save_params
    from mergelab.models.sites import Edit, Tap, TokenPlaces, match_sites
    from mergelab.models.streamed import StreamedParams, Streaming
    from mergelab.models.table import Leaf, Parameter, build_table, stored_shapes, tree_from_leaves

__all__ = [
    "FAMILIES",
    "Architecture",
    "Cache",
    "Edit",
    "Family",
    "Footprint",
    "FurtherLayer",
    "Inventory",
    "Leaf",
    "Model",
    "Output",
    "Parameter",
    "Params",
    "ResidualWriter",
    "StreamedParams",
    "Streaming",
    "Tap",
    "TokenPlaces",
    "build_table",
    "load_further_layer",
    "load_model",
    "load_orbax",
    "load_params",
    "match_sites",
    "model_from_config",
    "norm_gain",
    "readout",
    "save_model",
    "save_orbax",
    "save_params",
    "stored_shapes",
    "take_inventory",
    "tree_from_leaves",
    "unembedding",
    "writers",
]

__getattr__, __dir__ = lazy_names(__name__)
