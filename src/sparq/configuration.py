"""Frozen dataclasses from YAML and back: every key and every type is checked, and a mistake is one line."""

import copy
import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from sparq.errors import SparqError, near_matches

Config = TypeVar("Config")
"""A dataclass."""

# YAML 1.1, which PyYAML follows, reads 1e-3 as text because it has no dot.
_EXPONENT_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")

_YAML_BREAK = re.compile("[\x85\u2028\u2029]")

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def from_mapping(cls: type[Config], mapping: Any, where: str = "recipe") -> Config:
    """Build a dataclass from nested mappings.

    Fields may be dataclasses, `tuple[X, ...]` and `tuple[X, Y]`, `dict[str, X]`, `Literal`, unions, `bool`,
    `int`, `float`, `str`, `Path` and `Any`. Nothing is guessed: `1` is not `true`, `"3"` is not a number. The
    one exception is text such as `1e-3` for a float, which YAML 1.1 does not know as a number.

    Args:
        cls: the dataclass.
        mapping: what a YAML file holds at this place.
        where: the dotted path of this place, for messages.

    Raises:
        SparqError: a key is unknown or missing, or a value has the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    if not isinstance(mapping, Mapping):
        raise _wrong(where, mapping, f"a mapping of settings ({', '.join(fields)})")
    for key in mapping:
        if key not in fields:
            raise SparqError(f"{_child(where, key)} is unknown: {near_matches(str(key), fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], _child(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SparqError(f"{_child(where, name)} is missing: expected {_describe(hints[name])}")
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """Return the nested mappings, lists and scalars that `from_mapping` turns into an equal dataclass."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping; a key given twice is an error.

    Raises:
        SparqError: the file is missing, is not YAML, or does not hold a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SparqError(f"no such file: {path}") from error
    except OSError as error:
        raise SparqError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SparqError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    value = _parse(text, str(path))
    if not isinstance(value, dict):
        raise SparqError(f"{path} holds {_show(value)}: expected a mapping of settings, `key: value`")
    return value


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """Return YAML text, keys in the given order."""
    text = yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True, width=110)
    if _YAML_BREAK.search(text):
        # PyYAML writes these line breaks as they are and reads them as spaces, so everything is escaped.
        return yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=False, width=110)
    return text


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of nested mappings with settings such as `train.updates=10` put in.

    The value is YAML, so `frameworks=[vanilla, softmax1]` is a list. A number in the path indexes a list:
    `prepare.sources.0.corpus=an4`.

    Raises:
        SparqError: there is no `=`, the value is not YAML, or the path leads into a scalar or past a list.
    """
    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        path, separator, text = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise SparqError(f"setting {override!r} is not of the form key=value, for example train.updates=10")
        value = _parse(text, f"setting {override!r}")
        place: Any = result
        for depth, key in enumerate(keys):
            slot = _slot(place, key, f"setting {override!r}: {'.'.join(keys[:depth])}")
            if depth == len(keys) - 1:
                place[slot] = value
            elif isinstance(place, dict) and place.get(slot) is None:
                place[slot] = {}
            place = place[slot]
    return result


def _slot(place: Any, key: str, where: str) -> str | int:
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise SparqError(f"{where} is {_show(place)}, which has no settings inside")
    if key.isascii() and key.isdigit() and int(key) < len(place):
        return int(key)
    right = f"expected 0 to {len(place) - 1}" if place else "it is empty"
    raise SparqError(f"{where} is a list of {len(place)}: {right}, not {key!r}")


class _Loader(yaml.SafeLoader):
    """The safe loader, which would let the last of two equal keys win, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            # A key of `<<` merges another mapping in, whose keys may be repeated here on purpose.
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise SparqError(f"{source}{line}: {_one_line(error.problem or error.context)}") from error
    except yaml.YAMLError as error:
        raise SparqError(f"{source} is not YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise SparqError(f"{source} is nested too deeply") from error
    except ValueError as error:  # for example a date in month 13
        raise SparqError(f"{source} is not YAML: {_one_line(error)}") from error


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast("type[Any]", kind), value, where)
    if origin is Literal:
        return _convert_literal(arguments, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is tuple:
        return _convert_tuple(kind, arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a mapping")
        return {
            _convert(arguments[0], key, f"{where}'s key"): _convert(arguments[1], item, _child(where, key))
            for key, item in value.items()
        }
    return _convert_scalar(kind, value, where)


def _convert_literal(valid: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in valid:
        if type(choice) is type(value) and choice == value:
            return choice
    raise SparqError(f"{where} is {_show(value)}: {near_matches(str(value), map(str, valid))}")


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    if type(value) in kinds:
        return value
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:  # X | None: X's own message is the precise one
        return _convert(others[0], value, where)
    for kind in others:
        try:
            return _convert(kind, value, where)
        except SparqError:
            continue
    raise _wrong(where, value, " or ".join(_describe(kind) for kind in kinds))


def _convert_tuple(kind: Any, kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        hint = f"; write [{value}]" if isinstance(value, str) and value.isprintable() and len(value) < 60 else ""
        raise SparqError(f"{where} is {_show(value)}: expected {_describe(kind)}{hint}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise SparqError(f"{where} has {len(value)} entries: expected {len(kinds)}")
    return tuple(
        _convert(inner, item, f"{where}[{i}]") for i, (inner, item) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    assert kind in _EXPECTED or kind is type(None), f"{where}: configurations have no fields of type {kind}"
    if kind is float:
        return _convert_float(value, where)
    if kind is Path and isinstance(value, str | Path):
        if not str(value) or "\0" in str(value):
            raise _wrong(where, value, "a path")
        return Path(value)
    # bool is a subclass of int, and `k: true` must not mean 1.
    if type(value) is not kind:
        hint = "; quote it" if kind in (str, Path) and isinstance(value, bool | int | float) else ""
        raise _wrong(where, value, _describe(kind) + hint)
    return value


def _convert_float(value: Any, where: str) -> float:
    text = isinstance(value, str) and _EXPONENT_FLOAT.fullmatch(value)
    if isinstance(value, bool) or not (isinstance(value, int | float) or text):
        raise _wrong(where, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(where, value, "a finite number")
    return number


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(inner) for inner in arguments)
    if origin is tuple:
        return "a list"
    if kind is type(None):
        return "null"
    return _EXPECTED.get(kind, "a mapping of settings")


def _child(where: str, key: Any) -> str:
    if isinstance(key, str) and re.fullmatch(r"[\w-]+", key):
        return f"{where}.{key}"
    return f"{where}[{_show(key)}]"


def _wrong(where: str, value: Any, right: str) -> SparqError:
    return SparqError(f"{where} is {_show(value)}: expected {right}")


def _show(value: Any) -> str:
    # reprlib never walks a whole structure, so that neither a huge value nor an alias to itself takes long.
    text = "null" if value is None else _one_line(reprlib.repr(value))
    return text if len(text) <= 120 else text[:117] + "..."


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())
