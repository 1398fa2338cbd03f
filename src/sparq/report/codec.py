"""results.json: strict reading and atomic writing of the records, with infinities and NaN as strings."""

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from sparq.errors import SparqError, near_matches
from sparq.files import read_json, write_text
from sparq.report.results import SCHEMA_VERSION, Results, Row, SpeechReference

Record = TypeVar("Record")
"""A dataclass."""

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_NUMBER_LIST = re.compile(r"\[\n[-+.\deE,\s]*\]")


def to_json(value: Any) -> Any:
    """Return records as JSON values.

    JSON has no infinity and no NaN, and an exploded perplexity is a result. They are written as the strings
    `"inf"`, `"-inf"` and `"nan"`, and read back as numbers wherever the schema says number. In `settings`,
    which has no schema, they stay strings.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    assert value is None or isinstance(value, bool | int | float | str), (
        f"{type(value).__name__} is not JSON: {value!r}"
    )
    return value


def from_json(value: Any) -> Results:
    """Return the results that `to_json` wrote.

    Raises:
        SparqError: another schema version, or a key or type outside the schema; the message names the place.
    """
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise SparqError(f"results have schema_version {version!r}: this sparq reads {SCHEMA_VERSION}")
    results = _decode(Results, value, "results")
    assert isinstance(results, Results)
    return results


def write_results(path: Path, results: Results) -> None:
    """Write results.json atomically; lists of numbers take one line each."""
    text = json.dumps(to_json(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, _NUMBER_LIST.sub(lambda match: " ".join(match[0].split()), text) + "\n")


def read_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        SparqError: the file is missing, is not JSON, or does not follow the schema.
    """
    value = read_json(path)
    try:
        return from_json(value)
    except SparqError as error:
        raise SparqError(f"{path}: {error}") from error


def _decode(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        # The schema's only unions are `X | None`.
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(inner, value, place)
    if origin is Literal:
        if value not in arguments:
            raise SparqError(f"{place} is {value!r}: {near_matches(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        items = _expect(list, value, place)
        return tuple(_decode(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(items))
    if origin is dict:
        mapping = _expect(dict, value, place)
        return {key: _decode(arguments[1], item, f"{place}.{key}") for key, item in mapping.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_record(kind, value, place)
    if kind is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    if kind is int and isinstance(value, bool):
        raise SparqError(f"{place} is {value!r}: an integer is needed")
    return _expect(kind, value, place)


def _decode_record(kind: Any, value: Any, place: str) -> Any:
    mapping = _expect(dict, value, place)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in mapping:
        if key not in fields:
            raise SparqError(f"{place} has unknown key {key!r}: {near_matches(key, fields)}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in mapping and not has_default:
            raise SparqError(f"{place} lacks key {name!r}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _decode(hints[key], item, f"{place}.{key}") for key, item in mapping.items()})


def _expect(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, kind):
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        names = {"list": "list", "dict": "object", "str": "string", "float": "number", "int": "integer"}
        needed = names.get(kind.__name__, kind.__name__)
        raise SparqError(f"{place} is {shown}: {'an' if needed[0] in 'aeiou' else 'a'} {needed} is needed")
    return value


def references_from_json(value: Any, place: str) -> tuple[SpeechReference, ...]:
    """Return the references of TTS that `to_json` wrote.

    Raises:
        SparqError: a key or type outside the schema; the message names the place.
    """
    references: tuple[SpeechReference, ...] = _decode(tuple[SpeechReference, ...], value, place)
    return references


def row_from_json(value: Any, place: str) -> Row:
    """Return the row that `to_json` wrote.

    Raises:
        SparqError: a key or type outside the schema; the message names the place.
    """
    return record_from_json(Row, value, place)


def record_from_json(kind: type[Record], value: Any, place: str) -> Record:
    """Return a record of any dataclass that `to_json` wrote.

    Raises:
        SparqError: a key or type outside the schema; the message names the place.
    """
    record = _decode(kind, value, place)
    assert isinstance(record, kind)
    return record
