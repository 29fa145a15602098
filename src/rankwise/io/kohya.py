"""kohya's networks: dots of module names as underscores, down, up and alpha for each module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rankwise.errors import ArtifactError, UserError, gather, nearest
from rankwise.io.holding import FORMATS, demand
from rankwise.io.portable import Kernel, Portable, assemble, pairs
from rankwise.io.reforms import join_parts, one_alpha, without_starts
from rankwise.io.tensors import read_tensors, shown, write_tensors
from rankwise.lowrank import Factors

__all__ = ["PREFIXES", "read_kohya", "write_kohya"]

# What stands in front of a module's name, and what diffusers calls that model of its pipeline.
PREFIXES = {
    "lora_unet": "unet",
    "lora_transformer": "transformer",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
_ENDS = {
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}
_OTHER_KINDS = {
    "lora_mid.weight": "a third factor (LoCon with Tucker decomposition)",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
    "diff": "whole differences of weights",
}


def read_kohya(
    path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    component: str | None = None,
    allow_nonfinite: bool = False,
) -> Portable:
    """Read a network of kohya's sd-scripts for one model of a pipeline.

    A key is ``lora_unet_<module name with _ for .>.lora_down.weight`` (r, in[, k...]), with
    ``.lora_up.weight`` (out, r[, 1...]), ``.alpha`` and perhaps ``.dora_scale``; s = alpha / r, and
    alpha is r where it is missing or 0. ``down_blocks_0`` may have been ``down_blocks.0`` or
    ``down.blocks_0``: only the module ``names`` of the base tell.

    Raises:
        UserError: there is no such file, the file has several models and none was named, or names
            are missing, unknown to the base or ambiguous there.
        ArtifactError: lists all that is wrong with the file.
        EnvironmentFault: it cannot be read.
    """
    where = f"'{path}'"
    tensors = read_tensors(path, allow_nonfinite=allow_nonfinite).tensors
    split = _split(tensors, where)
    prefix = _chosen(list(split), component, where)
    if not names:
        raise UserError(
            f"{where} has names like '{next(iter(split[prefix]))}', where every dot became an "
            "underscore, so the module names of the base are needed for the way back (names=, "
            "--base FOLDER)."
        )
    table = _spelled(split[prefix], names, where)
    own = {table[flat]: both for flat, both in split[prefix].items()}
    factors, magnitudes = _updates(own, where)
    other = [p for p in split if p != prefix]
    return Portable(
        assemble(factors, magnitudes=magnitudes),
        kernels={n: k for n, both in own.items() if (k := _kernel(both)) is not None},
        component=PREFIXES[prefix],
        notes=(f"left out: {', '.join(other)}, other models of the pipeline",) if other else (),
    )


def write_kohya(
    portable: Portable, path: str | os.PathLike[str], *, component: str | None = None
) -> Portable:
    """Write a network of kohya, with one alpha for all modules.

    The format has an alpha for each, but diffusers loses those that differ from the most frequent
    one (seen in 0.42), so where they differ the rest goes into B.

    ``component`` is the model of the pipeline, by kohya's prefix ("lora_te1") or by diffusers' name
    ("unet"); the one that the adapter was read for when it is not given.

    Raises:
        UserError: lists what these files cannot hold, or names that would become the same.
        EnvironmentFault: the disk refuses.
    """
    demand(portable, FORMATS["kohya"])
    prefix = _prefix(component or portable.component)
    portable, alpha = one_alpha(
        join_parts(without_starts(portable)), "diffusers loses alphas that differ between modules"
    )
    names = [_flat_name(prefix, name) for name in portable.factors]
    twice = sorted({name for name in names if names.count(name) > 1})
    gather(UserError, "Two modules would have one name", [f"'{name}'." for name in twice])
    tensors: dict[str, Tensor] = {}
    for name, f in portable.factors.items():
        key = _flat_name(prefix, name)
        kernel = portable.kernels.get(name)
        ones = () if kernel is None else tuple(1 for _ in kernel.shape[1:])
        tensors[f"{key}.lora_down.weight"] = (
            f.A if kernel is None else f.A.reshape(-1, *kernel.shape)
        )
        tensors[f"{key}.lora_up.weight"] = f.B.reshape(*f.B.shape, *ones)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        if name in portable.adapter.magnitudes:
            m = portable.adapter.magnitudes[name]
            tensors[f"{key}.dora_scale"] = m.reshape(-1, 1, *ones)
    write_tensors(path, tensors, _metadata(portable, alpha))
    return portable.noting(
        f"names: '{next(iter(portable.factors))}' became '{names[0]}', and so on; the way back "
        "needs the module names of the base"
    )


def _metadata(portable: Portable, alpha: float) -> dict[str, str]:
    """What kohya's tools show of a file; the tensors say the same for each module."""
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(f.r for f in portable.factors.values())),
        "ss_network_alpha": f"{alpha:g}",
    }


def _split(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Tensors by prefix, flat module name and role."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        flat, _, end = key.partition(".")
        prefix = next((p for p in sorted(PREFIXES, reverse=True) if flat.startswith(p + "_")), None)
        if end in _OTHER_KINDS:
            problems.append(f"{shown(key)} is {_OTHER_KINDS[end]}, and no plain low-rank update.")
        elif prefix is None or end not in _ENDS:
            problems.append(
                f"{shown(key)} is no name of kohya's, such as 'lora_unet_conv_in.lora_up.weight'."
            )
        else:
            found.setdefault(prefix, {}).setdefault(flat, {})[_ENDS[end]] = tensor
    if not found:
        problems.append("it holds no low-rank factors.")
    gather(ArtifactError, f"{where} cannot be used", problems)
    return found


def _chosen(prefixes: list[str], component: str | None, where: str) -> str:
    if component is None:
        if len(prefixes) == 1:
            return prefixes[0]
        raise UserError(
            f"{where} is for several models of a pipeline ({', '.join(prefixes)}), and an adapter "
            f"is for one. Name it: component='{prefixes[0]}', --component {prefixes[0]}."
        )
    fits = [p for p in prefixes if component in (p, PREFIXES[p])]
    if not fits:
        raise UserError(f"{where} holds nothing for '{component}'; it has {', '.join(prefixes)}.")
    return fits[0]


def _prefix(component: str | None) -> str:
    if component in PREFIXES:
        return component
    fits = [prefix for prefix, name in PREFIXES.items() if name == component]
    if not fits:
        said = "nothing was said" if component is None else f"'{component}' is none of them"
        raise UserError(
            "A network of kohya names the model of the pipeline that each update is for, and "
            f"{said}. Give component (--component), one of: {', '.join(PREFIXES)}."
        )
    return fits[0]


def _flat_name(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


def _spelled(flat: Iterable[str], names: Sequence[str], where: str) -> dict[str, str]:
    """Each flat name's module name of the base."""
    table: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        table.setdefault(name.replace(".", "_"), []).append(name)
    found: dict[str, str] = {}
    problems: list[str] = []
    for key in flat:
        prefix = next(p for p in sorted(PREFIXES, reverse=True) if key.startswith(p + "_"))
        meant = table.get(key.removeprefix(prefix + "_"), [])
        if len(meant) == 1:
            found[key] = meant[0]
        elif meant:
            problems.append(f"'{key}' may be {' or '.join(meant)}.")
        else:
            hint = nearest(key.removeprefix(prefix + "_"), table, 1) if len(problems) < 3 else ""
            problems.append(f"'{key}' is no module of the base.{hint}")
    gather(UserError, f"The names in {where} cannot be told from those of the base", problems)
    return found


def _kernel(both: Mapping[str, Tensor]) -> Kernel | None:
    a = both.get("A")
    return Kernel(tuple(a.shape[1:])) if a is not None and a.ndim > 2 else None


def _updates(
    own: Mapping[str, Mapping[str, Tensor]], where: str
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors and magnitudes of each module."""
    flat = {
        name: {side: both[side].flatten(1) for side in "AB" if side in both and both[side].ndim > 1}
        for name, both in own.items()
    }
    factors: dict[str, Factors] = {}
    magnitudes: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, (a, b) in pairs(flat, where).items():
        given = own[name].get("alpha")
        alpha = 0.0 if given is None else float(given.reshape(-1)[0])
        if alpha < 0:
            problems.append(f"'{name}' has alpha {alpha:g}, which must not be negative.")
            continue
        factors[name] = Factors(a, b, (alpha or a.shape[0]) / a.shape[0])
        m = own[name].get("magnitude")
        if m is not None and not m.shape[0] == m.numel() == b.shape[0]:
            problems.append(
                f"'{name}' has a dora_scale {tuple(m.shape)}; a magnitude by output, "
                f"({b.shape[0]}, 1), is needed. One by input is another method."
            )
        elif m is not None:
            magnitudes[name] = m.reshape(-1)
    gather(ArtifactError, f"{where} cannot be used", problems)
    return factors, magnitudes
