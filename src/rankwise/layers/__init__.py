"""A frozen layer plus δ: what can be adapted, the layers that do it, and what trains in them."""

from rankwise.layers.bottleneck import Activation, Network, network
from rankwise.layers.build import adapt, bare, drop_updates, low_rank, offset, token_rows, wrap
from rankwise.layers.dropping import all_by_seed
from rankwise.layers.frozen import (
    dense_weight,
    is_quantized,
    keep_order,
    quantization,
    reorder,
    rounds_inputs,
)
from rankwise.layers.fusing import is_packed, pack, unpack
from rankwise.layers.host import LoRAHost, released
from rankwise.layers.layer import (
    LoRAConv,
    LoRAEmbedding,
    LoRALayer,
    LoRALinear,
    LoRAWrapper,
    has_bias,
)
from rankwise.layers.layout import (
    Layout,
    Split,
    is_conv1d,
    is_wrapped,
    layout_of,
    layouts,
    refusal,
    shape_of,
)
from rankwise.layers.packing import Packing, optimize_frozen, restore_frozen
from rankwise.layers.prefix import FreePrefix, GrownPrefix, Prefix, Trunk
from rankwise.layers.recompute import Recomputation, keep_activations, recompute_activations
from rankwise.layers.recomputing import is_recomputing
from rankwise.layers.rows import ByRows, Routing
from rankwise.layers.spec import Spec, Switch
from rankwise.layers.update import (
    Change,
    LowRank,
    Offset,
    Shared,
    TokenRows,
    Update,
    place_of,
    wide_dtype,
)

__all__ = [
    "Activation",
    "ByRows",
    "Change",
    "FreePrefix",
    "GrownPrefix",
    "Layout",
    "LoRAConv",
    "LoRAEmbedding",
    "LoRAHost",
    "LoRALayer",
    "LoRALinear",
    "LoRAWrapper",
    "LowRank",
    "Network",
    "Offset",
    "Packing",
    "Prefix",
    "Recomputation",
    "Routing",
    "Shared",
    "Spec",
    "Split",
    "Switch",
    "TokenRows",
    "Trunk",
    "Update",
    "adapt",
    "all_by_seed",
    "bare",
    "dense_weight",
    "drop_updates",
    "has_bias",
    "is_conv1d",
    "is_packed",
    "is_quantized",
    "is_recomputing",
    "is_wrapped",
    "keep_activations",
    "keep_order",
    "layout_of",
    "layouts",
    "low_rank",
    "network",
    "offset",
    "optimize_frozen",
    "pack",
    "place_of",
    "quantization",
    "recompute_activations",
    "refusal",
    "released",
    "reorder",
    "restore_frozen",
    "rounds_inputs",
    "shape_of",
    "token_rows",
    "unpack",
    "wide_dtype",
    "wrap",
]
