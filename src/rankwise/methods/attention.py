"""How a prefix gets into the attention of a transformers model: its interface, and its heads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import UserError
from rankwise.kernels import BatchRows
from rankwise.layers import LoRALayer, Prefix
from rankwise.targets import Site, sites

__all__ = ["Prefixed", "attention_sites", "heads_of", "prefixed", "unfit"]

NAME = "rankwise_prefix"
SUPPORTED = ("eager", "sdpa")
_REGISTRY, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"

# What the attention modules of transformers call the size of a head; those whose keys and values
# differ in it (qk_head_dim, v_head_dim) are not served.
_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
# What they, or else their configs, call the number of heads of the keys, and where there is no such
# number, that of all heads.
_KEY_HEADS = ("num_key_value_heads", "kv_heads")
_HEADS = ("num_heads", "num_attention_heads", "n_heads")

Attend = Callable[..., tuple[Tensor, Tensor | None]]


class Prefixed:
    """A config that names our attention function; all else is the config's own.

    Only the attention that carries a prefix gets it, in the place of its ``config``: the model's
    own config, from which it makes its masks, is not touched.
    """

    def __init__(self, config: object) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        return NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def __reduce__(self) -> tuple[object, ...]:
        return prefixed, (self.config,)  # so that a copy in another process registers as well


def prefixed(config: object) -> Prefixed:
    """A config whose attention goes through :func:`attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return config if isinstance(config, Prefixed) else Prefixed(config)


def attention_sites(model: nn.Module) -> Iterator[Site]:
    """The attention modules of a model that ask transformers' registry for their function."""
    for site in sites(model).values():
        if _REGISTRY in _names(site.base) and "config" in vars(site.base):
            yield site


def _forward(module: nn.Module) -> object:
    return inspect.unwrap(type(module).forward)


def _names(module: nn.Module) -> tuple[str, ...]:
    """The names that the code of the module's forward uses."""
    forward = _forward(module)
    return forward.__code__.co_names if isinstance(forward, FunctionType) else ()


def unfit(site: Site) -> str | None:
    """Why this attention cannot have a prefix, or None."""
    module = site.base
    how = vars(module)["config"]._attn_implementation
    if how not in SUPPORTED or (how == "eager" and _EAGER not in _names(module)):
        return (
            f"it computes attention with '{how}', and a prefix must know what the mask means "
            "there: load the model with attn_implementation='sdpa'"
        )
    return None if heads_of(module) is not None else "it does not say how many heads it has"


def heads_of(module: nn.Module) -> tuple[int, int] | None:
    """How many heads the keys of an attention have, and their size; None where it does not say."""
    own, config = vars(module), vars(vars(module)["config"])
    size = next((own[name] for name in _SIZES if name in own), None)
    told = ((held, n) for names in (_KEY_HEADS, _HEADS) for held in (own, config) for n in names)
    heads = next((held[name] for held, name in told if held.get(name) is not None), None)
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of the module's own config, with its prefixes in front of keys and values.

    Shapes: query (batch, heads of queries, q, d), key and value (batch, heads of keys, k, d), the
    mask (batch or 1, heads or 1, q, k or more), Boolean with True where a query sees a key, or
    numbers that are added to the scores. Every query sees the whole prefix.

    Where the rows of a batch go through different adapters, each row sees its own; of shares that
    then differ in number, none are given.
    """
    live = module.live() if isinstance(module, LoRALayer) else ()
    prefixes = [update for update in live if isinstance(update, Prefix)]
    routing = prefixes[0].switch.routing if prefixes else None
    if routing is None:
        return _attend(module, prefixes, query, key, value, attention_mask, options)
    routing.fit(query.shape, 3, type(module).__name__)

    def of(rows: BatchRows, shared: Tensor | None) -> Tensor | None:
        return shared if shared is None or len(shared) != len(query) else rows.pick(shared)

    parts: list[Tensor] = []
    shares: list[Tensor] = []
    for way, rows in routing.rows.items():
        own = [prefix for prefix in prefixes if prefix.switch.adapter in way]
        mine, mask = dict(options), of(rows, attention_mask)
        if "position_bias" in mine:
            mine["position_bias"] = of(rows, mine["position_bias"])
        q, k, v = (rows.pick(t) for t in (query, key, value))
        part, share = _attend(module, own, q, k, v, mask, mine)
        parts.append(part)
        shares += [] if share is None else [share]
    alike = len(shares) == len(parts) and len({share.shape[1:] for share in shares}) == 1
    return routing.join(parts), routing.join(shares) if alike else None


def _attend(
    module: nn.Module,
    prefixes: list[Prefix],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The same with one choice of prefixes for all rows."""
    how = vars(module)["config"].config._attn_implementation
    if prefixes:
        _check(how, options)
        if attention_mask is None and how == "sdpa":
            attention_mask = _causal(module, query, key, options)
        tokens = key.shape[2]
        for prefix in prefixes:
            key, value = prefix.before(key, value)
        length = key.shape[2] - tokens
        if attention_mask is not None:
            seen = attention_mask.dtype == torch.bool
            attention_mask = F.pad(attention_mask, (length, 0), value=seen)
        if options.get("position_bias") is not None:  # of T5: a prefix has no position
            options["position_bias"] = F.pad(options["position_bias"], (length, 0))
    return _own(module, how)(module, query, key, value, attention_mask, **options)


def _check(how: object, options: dict[str, Any]) -> None:
    if how not in SUPPORTED:
        raise UserError(
            f"The model now computes attention with '{how}', and a prefix must know what the mask "
            "means there: model.set_attn_implementation('sdpa')."
        )
    if options.get("cache") is not None:
        raise UserError("A prefix cannot be used with continuous batching, which pages its keys.")


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]
) -> Tensor | None:
    """The mask that torch's attention makes by itself where it is told no more than "causal"."""
    told = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if told is None else told
    rows, columns = query.shape[2], key.shape[2]
    if not causal or rows == 1:
        return None
    ones = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    return ones.tril()[None, None]


def _own(module: nn.Module, how: str) -> Attend:
    """The function that the module would have called without a prefix."""
    forward = _forward(module)
    assert isinstance(forward, FunctionType)
    names = forward.__globals__
    return cast("Attend", names[_REGISTRY].get_interface(how, names.get(_EAGER)))
