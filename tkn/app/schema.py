"""Configurations held against a dataclass: wrong keys and types are errors of one line that name the key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from tkn.app.messages import first_line, unknown


def typed(schema: type, config: DictConfig) -> DictConfig:
    """The configuration with the types of `schema`, a dataclass, its interpolations resolved.

    ValueError naming the first key that is unknown (with the nearest known one), missing or of another type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        OmegaConf.resolve(merged)
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise ValueError(unknown("key", error.full_key, _keys(schema))) from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    for key in OmegaConf.missing_keys(merged):
        raise ValueError(f"key {key!r} is missing")
    return merged


def check_rules(config: DictConfig, rules: Iterable[tuple[str, bool, str]]) -> None:
    """ValueError for the first of `rules` (key, is its value valid, what a valid one is) that does not hold."""
    for key, valid, wanted in rules:
        if not valid:
            raise ValueError(f"{key}={OmegaConf.select(config, key)} must be {wanted}")


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for item in fields(schema):
        if is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists stay."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
