"""rankwise.json: which method trained what, written from its values and checked when read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from rankwise.attaching import Method
from rankwise.errors import ArtifactError, UserError, gather
from rankwise.io.json_files import read_json
from rankwise.layers import Activation
from rankwise.methods.bitfit import BitFit
from rankwise.methods.bottleneck import After, Bottleneck, Houlsby, Pfeiffer
from rankwise.methods.full import Full
from rankwise.methods.head import HeadChoice, HeadOnly
from rankwise.methods.prefix import PrefixTuning

__all__ = ["KINDS", "card_of", "method_of", "read_card"]

KINDS = (HeadOnly, Full, BitFit, Bottleneck, PrefixTuning)
"""The methods that are saved tensor by tensor."""
MAX_CARD = 1_000_000  # bytes
_FORMAT = "rankwise-trained"
_VERSION = 1
_LISTS = ("target_modules", "exclude_modules", "layers")

T = TypeVar("T")


def card_of(method: Method, base: str | None, modules: tuple[str, ...]) -> dict[str, object]:
    """What is to be known of a method to attach it again.

    Of a prefix that grew from a network, that it is one of this length: what is saved of it are
    its keys and values.
    """
    card: dict[str, object] = {
        "format": _FORMAT,
        "version": _VERSION,
        "method": type(method).__name__,
        "base_model_name_or_path": base,
        "modules": list(modules),
        "modules_to_save": [] if isinstance(method, Full) else list(_further(method)),
    }
    options = _options(method)
    return card if options is None else {**card, "options": options}


def _further(method: Method) -> tuple[str, ...]:
    assert isinstance(method, HeadOnly | BitFit | Bottleneck | PrefixTuning)
    return tuple(method.modules_to_save)


def _options(method: Method) -> dict[str, object] | None:
    if isinstance(method, BitFit):
        return {"head": method.head}
    if isinstance(method, PrefixTuning):
        return {"length": method.length, "head": method.head}
    if isinstance(method, Bottleneck):
        return {
            "size": method.size,
            "activation": method.activation.value,
            "placement": _placement(method.placement),
            "head": method.head,
        }
    return None


def _placement(place: Houlsby | Pfeiffer | After) -> dict[str, object]:
    if isinstance(place, After):
        lists = {name: getattr(place, name) for name in _LISTS}
        held = {name: value if value is None else list(value) for name, value in lists.items()}
        return {"kind": "after", "norms": place.norms, **held}
    kind = "houlsby" if isinstance(place, Houlsby) else "pfeiffer"
    return {"kind": kind, "norms": place.norms}


def read_card(path: Path) -> dict[str, object]:
    """The card in a file, with the keys that every method has checked.

    Raises:
        ArtifactError: it is no such card; lists all that is wrong.
        UserError, EnvironmentFault: the file is missing or cannot be read.
    """
    card = read_json(path, MAX_CARD)
    problems: list[str] = []
    if card.get("format") != _FORMAT:
        problems.append(f"format must be '{_FORMAT}'.")
    if card.get("version") != _VERSION:
        problems.append(f"version must be {_VERSION}; a newer Rankwise may have written it.")
    names = [kind.__name__ for kind in KINDS]
    if card.get("method") not in names:
        problems.append(f"method must be one of {', '.join(map(repr, names))}.")
    problems.extend(
        f"{key} must be a list of names."
        for key in ("modules", "modules_to_save")
        if not _is_names(card.get(key))
    )
    gather(ArtifactError, f"'{path}' cannot be used", problems)
    return card


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in cast("list[object]", value))


def method_of(card: Mapping[str, object], path: Path) -> Method:
    """The method that a card tells of.

    Raises:
        ArtifactError: its options make no sense.
    """
    if card["method"] == Full.__name__:
        return Full()
    further = tuple(cast("list[str]", card["modules_to_save"]))
    if card["method"] == HeadOnly.__name__:
        return HeadOnly(modules_to_save=further)
    try:
        return _method(str(card["method"]), _Options(card.get("options"), "options"), further)
    except UserError as error:
        raise ArtifactError(f"'{path}' cannot be used: {error}") from error


def _method(kind: str, options: _Options, further: tuple[str, ...]) -> Method:
    heads: dict[object, HeadChoice] = {None: None, "train": "train", "freeze": "freeze"}
    head = options.one_of("head", heads)
    if kind == BitFit.__name__:
        return BitFit(head, further)
    if kind == PrefixTuning.__name__:
        return PrefixTuning(options.whole("length"), None, head, further)
    activation = options.one_of("activation", {a.value: a for a in Activation})
    place = _place(_Options(options.value("placement"), "placement"))
    return Bottleneck(options.whole("size"), place, activation, head, further)


def _place(options: _Options) -> Houlsby | Pfeiffer | After:
    kind = options.one_of("kind", {kind: kind for kind in ("houlsby", "pfeiffer", "after")})
    norms = options.one_of("norms", {True: True, False: False})
    if kind != "after":
        return Houlsby(norms) if kind == "houlsby" else Pfeiffer(norms)
    layers = None if options.value("layers") is None else options.listed("layers", int)
    targets, without = (options.listed(n, str) for n in ("target_modules", "exclude_modules"))
    return After(targets, without, layers, norms=norms)


class _Options:
    """A JSON object whose entries are taken with their types checked."""

    def __init__(self, held: object, name: str) -> None:
        if not isinstance(held, dict):
            raise UserError(f"{name} must be an object.")
        self.held = cast("dict[str, object]", held)
        self.name = name

    def value(self, key: str) -> object:
        if key not in self.held:
            raise UserError(f"{self.name} lacks '{key}'.")
        return self.held[key]

    def whole(self, key: str) -> int:
        value = self.value(key)
        if type(value) is not int:
            raise UserError(f"{key} must be a whole number.")
        return value

    def one_of(self, key: str, table: Mapping[Any, T]) -> T:
        value = self.value(key)
        for known, meant in table.items():
            if type(known) is type(value) and known == value:
                return meant
        raise UserError(f"{key} must be one of {', '.join(map(repr, table))}.")

    def listed(self, key: str, kind: type[T]) -> tuple[T, ...]:
        value = self.value(key)
        items = cast("list[object]", value) if isinstance(value, list) else [None]
        if not all(type(item) is kind for item in items):
            raise UserError(f"{key} must be a list of {kind.__name__}.")
        return tuple(cast("list[T]", items))
