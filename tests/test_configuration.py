"""Configurations: the round trip, and a line for every kind of mistake."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparq.configuration import apply_overrides, dump_yaml, from_mapping, load_yaml, to_mapping
from sparq.errors import SparqError
from sparq.recipes.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Inner:
    label: str
    weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    updates: int
    rate: float = 3e-4
    fast: bool = False
    method: Literal["full", "lora"] = "lora"
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "a")
    parts: tuple[Inner, ...] = ()
    inner: Inner = field(default_factory=lambda: Inner(label="x"))
    path: Path | None = None
    mixed: int | str = 0
    options: dict[str, float] = field(default_factory=dict)
    anything: Any = None


class Plan(NamedTuple):
    """A dataclass yet to be made: a run-time type checker in its `__init__` may draw random numbers."""

    kind: Any
    values: dict[str, Any]


def make(value: Any) -> Any:
    if isinstance(value, Plan):
        return value.kind(**{name: make(inner) for name, inner in value.values.items()})
    return tuple(make(inner) for inner in value) if isinstance(value, tuple) else value


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type, invalid ranges included: the round trip must not care."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = {f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind)}
        return st.fixed_dictionaries(fields).map(lambda values: Plan(kind, values))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(inner) for inner in arguments])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*(values_of(inner) for inner in arguments))
    if origin is dict:
        return st.dictionaries(text, values_of(arguments[1]), max_size=3)
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: text,
        Path: st.text("abc./${}~ é", min_size=1, max_size=8).map(Path),
        type(None): st.none(),
        Any: st.one_of(st.none(), st.integers(), text),
    }
    return scalars[kind]


text = st.text(st.characters(codec="utf-8"), max_size=12)


@pytest.mark.parametrize("cls", [Outer, Recipe])
@settings(max_examples=60)
@given(data=st.data())
def test_round_trip_through_mapping_and_yaml(cls: type, data: st.DataObject, tmp_path_factory: Any) -> None:
    config = make(data.draw(values_of(cls)))
    mapping = to_mapping(config)
    assert from_mapping(cls, mapping) == config
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump_yaml(mapping), encoding="utf-8")
    assert from_mapping(cls, load_yaml(file)) == config


def test_defaults_fill_what_is_not_given() -> None:
    assert from_mapping(Outer, {"updates": 3}) == Outer(updates=3)


@pytest.mark.parametrize("value", ["1e-3", "1E-3", "1.e-3", "0.1e-2", ".1e-2", "+1e-3"])
def test_exponents_without_a_dot_are_numbers(value: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"updates: 1\nrate: {value}\n")
    assert from_mapping(Outer, load_yaml(tmp_path / "r.yaml")).rate == pytest.approx(1e-3)


def test_whole_numbers_are_floats_but_not_the_reverse() -> None:
    rate = from_mapping(Outer, {"updates": 1, "rate": 2}).rate
    assert (rate, type(rate)) == (2.0, float)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"updates": 1, "rte": 2}, "recipe.rte is unknown: did you mean 'rate'?"),
        (
            {"updates": 1, "inner": {"label": "a", "wait": 1}},
            "recipe.inner.wait is unknown: did you mean 'weight'?",
        ),
        (
            {"updates": 1, "parts": [{"label": "a"}, {"labl": "b"}]},
            "recipe.parts[1].labl is unknown: did you mean 'label'?",
        ),
        ({"updates": 1, "inner": {"zzz": 1}}, "recipe.inner.zzz is unknown: valid: label, weight"),
        ({"updates": 1, 7: 2}, "recipe[7] is unknown: valid: updates, rate, "),
        ({"updates": 1, "a\nb": 2}, r"recipe['a\nb'] is unknown: valid: updates"),
        ({}, "recipe.updates is missing: expected a whole number"),
        ({"updates": 1, "inner": {}}, "recipe.inner.label is missing: expected text"),
        ({"updates": "10"}, "recipe.updates is '10': expected a whole number"),
        ({"updates": 1.0}, "recipe.updates is 1.0: expected a whole number"),
        ({"updates": True}, "recipe.updates is True: expected a whole number"),
        ({"updates": None}, "recipe.updates is null: expected a whole number"),
        ({"updates": 1, "rate": "3.0"}, "recipe.rate is '3.0': expected a number"),
        ({"updates": 1, "rate": True}, "recipe.rate is True: expected a number"),
        ({"updates": 1, "rate": float("nan")}, "recipe.rate is nan: expected a finite number"),
        ({"updates": 1, "rate": "1e999"}, "recipe.rate is '1e999': expected a finite number"),
        ({"updates": 1, "fast": 1}, "recipe.fast is 1: expected true or false"),
        ({"updates": 1, "fast": "yes"}, "recipe.fast is 'yes': expected true or false"),
        ({"updates": 1, "method": "lorra"}, "recipe.method is 'lorra': did you mean 'lora'?"),
        ({"updates": 1, "method": 3}, "recipe.method is 3: valid: full, lora"),
        ({"updates": 1, "names": "ab"}, "recipe.names is 'ab': expected a list; write [ab]"),
        ({"updates": 1, "names": ["a", 2]}, "recipe.names[1] is 2: expected text; quote it"),
        ({"updates": 1, "pair": [1]}, "recipe.pair has 1 entries: expected 2"),
        ({"updates": 1, "parts": {"label": "a"}}, "recipe.parts is {'label': 'a'}: expected a list"),
        (
            {"updates": 1, "inner": None},
            "recipe.inner is null: expected a mapping of settings (label, weight)",
        ),
        ({"updates": 1, "path": 3}, "recipe.path is 3: expected a path; quote it"),
        ({"updates": 1, "path": ""}, "recipe.path is '': expected a path"),
        ({"updates": 1, "mixed": 1.5}, "recipe.mixed is 1.5: expected a whole number or text"),
        ({"updates": 1, "options": []}, "recipe.options is []: expected a mapping"),
        ({"updates": 1, "options": {"a": "b"}}, "recipe.options.a is 'b': expected a number"),
        ([], "recipe is []: expected a mapping of settings (updates, rate, "),
    ],
)
def test_mistakes(mapping: Any, message: str) -> None:
    with pytest.raises(SparqError) as caught:
        from_mapping(Outer, mapping)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_huge_values_are_cut_short() -> None:
    with pytest.raises(SparqError) as caught:
        from_mapping(Outer, {"updates": [["x" * 10_000] * 1000] * 1000})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "{file}, line 3: the key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 1\n", "{file}, line 3: the key 'b' is given twice"),
        ("a: [1, 2\nb: 3\n", "{file}, line 2: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "{file}, line 2: found character '\\t'"),
        ("a: !!python/object/apply:os.system [ls]\n", "{file}, line 1: could not determine a constructor"),
        ("a: 2020-13-45\n", "{file} is not YAML: month must be in 1..12"),
        ("a: \x01\n", "{file} is not YAML: "),
        ("", "{file} holds null: expected a mapping"),
        ("- 1\n", "{file} holds [1]: expected a mapping"),
        ("a: " + "[" * 5000 + "\n", "{file} is nested too deeply"),
    ],
)
def test_files_that_are_not_mappings(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    with pytest.raises(SparqError) as caught:
        load_yaml(file)
    assert str(caught.value).startswith(message.format(file=file))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match="no such file: "):
        load_yaml(tmp_path / "r.yaml")
    with pytest.raises(SparqError, match=r"cannot read .*: Is a directory"):
        load_yaml(tmp_path)
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(SparqError, match=r"is not UTF-8 text: invalid start byte at byte 3"):
        load_yaml(tmp_path / "r.yaml")


def test_merged_keys_may_be_repeated(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  a: 3\n")
    assert load_yaml(file)["other"] == {"a": 3, "b": 2}


def test_an_alias_to_itself_is_a_wrong_value(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("updates: &u [*u]\n")
    with pytest.raises(SparqError, match=r"recipe.updates is \[.*\]: expected a whole number"):
        from_mapping(Outer, load_yaml(file))


def test_overrides() -> None:
    before = {"train": {"updates": 1}, "sources": [{"corpus": "a"}], "empty": None}
    after = apply_overrides(
        before,
        [
            "train.updates=10",
            "train.rate=1e-3",
            "sources.0.corpus=b=c",
            "names=[x, y]",
            "new.deep.key=true",
            "empty.key=",
            "train.updates=11",
        ],
    )
    assert after == {
        "train": {"updates": 11, "rate": "1e-3"},
        "sources": [{"corpus": "b=c"}],
        "names": ["x", "y"],
        "new": {"deep": {"key": True}},
        "empty": {"key": None},
    }
    assert before == {"train": {"updates": 1}, "sources": [{"corpus": "a"}], "empty": None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updates", "setting 'updates' is not of the form key=value, for example train.updates=10"),
        ("=3", "setting '=3' is not of the form key=value"),
        ("a..b=3", "setting 'a..b=3' is not of the form key=value"),
        ("a=[1", "setting 'a=[1', line 1: expected ',' or ']'"),
        ("n.x=1", "setting 'n.x=1': n is 5, which has no settings inside"),
        ("n.x.y=1", "setting 'n.x.y=1': n is 5, which has no settings inside"),
        ("l.2=1", "setting 'l.2=1': l is a list of 2: expected 0 to 1, not '2'"),
        ("l.x.y=1", "setting 'l.x.y=1': l is a list of 2: expected 0 to 1, not 'x'"),
        ("e.0=1", "setting 'e.0=1': e is a list of 0: it is empty, not '0'"),
    ],
)
def test_overrides_that_do_not_fit(override: str, message: str) -> None:
    with pytest.raises(SparqError) as caught:
        apply_overrides({"n": 5, "l": [1, 2], "e": []}, [override])
    assert str(caught.value).startswith(message)
