"""Stands in for pydantic where it is not installed: as much of it as SGLang's plan tables are read with."""

from __future__ import annotations

import types
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

_ModelT = TypeVar("_ModelT", bound="BaseModel")


class _Default:
    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class BaseModel:
    """Fields by annotation; unknown ones are refused."""

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            ValueError: a field that is unknown or missing.
        """
        hints = {name: hint for name, hint in get_type_hints(type(self)).items() if name != "model_config"}
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise ValueError(f"{type(self).__name__}: found {unknown}, allowed {sorted(hints)}")
        for name, hint in hints.items():
            if name in values:
                value = _read(values[name], hint)
            elif not hasattr(type(self), name):
                raise ValueError(f"{type(self).__name__}: {name} is missing")
            else:
                default = getattr(type(self), name)
                value = default.make() if isinstance(default, _Default) else default
            setattr(self, name, value)

    @classmethod
    def model_validate(cls: type[_ModelT], raw: dict[str, Any]) -> _ModelT:
        """Read a JSON object.

        Raises:
            ValueError: as the constructor's.
        """
        return cls(**raw)

    def model_dump(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


def _read(value: Any, hint: Any) -> Any:
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fitting = (kind for kind in of if _fits(value, kind))
        return _read(value, next(fitting))
    if origin is list:
        return [_read(item, of[0]) for item in value]
    if origin is dict:
        return dict(value)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint.model_validate(value)
    return hint(value) if isinstance(hint, type) and issubclass(hint, Enum) else value


def _fits(value: Any, kind: Any) -> bool:
    return (value is None) == (kind is type(None))


def _model_validator(mode: str) -> Callable[[Any], Any]:
    """The rows that are read are the package's own: what checks them further is left out."""
    return lambda method: method


NAMES: dict[str, object] = {
    "BaseModel": BaseModel,
    "ConfigDict": dict,
    "Field": lambda default_factory: _Default(default_factory),
    "model_validator": _model_validator,
}
