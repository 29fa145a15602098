"""Flags follow from the config's fields."""

from __future__ import annotations

import inspect

from rankwise.cli.options import given, with_options
from rankwise.train.config import FitConfig


def test_every_field_becomes_a_flag_of_its_name() -> None:
    @with_options()
    def command(*, config: str | None = None, **options: object) -> None: ...

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["config", *FitConfig.model_fields]
    assert all(p.default is None for p in parameters.values())


def test_groups_and_names_pick_fields() -> None:
    @with_options(groups=("Method",), names=("model",))
    def command(**options: object) -> None: ...

    taken = set(inspect.signature(command).parameters)
    assert {"model", "r", "alpha", "head"} <= taken
    assert not {"data", "out", "lr"} & taken


def test_a_parameter_of_the_command_replaces_the_field_of_its_name() -> None:
    @with_options(groups=("Data",))
    def command(*, eval_fraction: int = 3, **options: object) -> None: ...

    parameters = inspect.signature(command).parameters
    assert "data" in parameters
    assert list(parameters).count("eval_fraction") == 1
    assert parameters["eval_fraction"].default == 3


def test_only_what_was_given_is_passed_on() -> None:
    assert given({"r": None, "seed": 0, "group_by_length": False}) == {
        "seed": 0,
        "group_by_length": False,
    }
