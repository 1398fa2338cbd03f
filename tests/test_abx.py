"""ABX: time warping and triples against slow references, closed forms, the command on a run."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import small_world
from sparq.audio.alignments import Phone, Triphone, frames_between, triphones
from sparq.cli.main import main
from sparq.evaluation import AbxItem, AbxRate, abx_errors, angular_distances, dtw, identity_distances
from sparq.evaluation.dtw import dtw_distances
from sparq.recipes import unit_score
from sparq.units import KMeans, expand, read_units

K = 5
Paths = list[tuple[float, int]]


def table(seed: int) -> np.ndarray:
    """Symmetric distances in eighths, which sum without rounding and often tie; 0 on the diagonal."""
    random = np.random.default_rng(seed).integers(1, 9, (K, K)) / 8
    return np.triu(random, 1) + np.triu(random, 1).T


def every_path(x: Sequence[int], y: Sequence[int], distances: np.ndarray, i: int = 0, j: int = 0) -> Paths:
    """Sum and length of every path from (i, j) to the end."""
    here = float(distances[x[i], y[j]])
    if (i, j) == (len(x) - 1, len(y) - 1):
        return [(here, 1)]
    steps = [(a, b) for a, b in ((i + 1, j), (i, j + 1), (i + 1, j + 1)) if a < len(x) and b < len(y)]
    return [(here + total, length + 1) for a, b in steps for total, length in every_path(x, y, distances, a, b)]


def slow_dtw(x: Sequence[int], y: Sequence[int], distances: np.ndarray) -> float:
    """A double loop over a table of (sum, length)."""
    best: dict[tuple[int, int], tuple[float, int]] = {(-1, -1): (0.0, 0)}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        before = min(best[p] for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in best)
        best[i, j] = (before[0] + distances[x[i], y[j]], before[1] + 1)
    total, length = best[len(x) - 1, len(y) - 1]
    return total / length


def slow_rate(items: Sequence[AbxItem], distances: np.ndarray, *, across: bool) -> AbxRate | None:
    """Every triple by itself."""
    cells = defaultdict(list)
    for a, b, x in itertools.product(items, repeat=3):
        same_place = a.context == b.context == x.context and a.speaker == b.speaker
        if same_place and a.phone == x.phone != b.phone and a is not x and (a.speaker != x.speaker) == across:
            to_a, to_b = (slow_dtw(x.units, other.units, distances) for other in (a, b))
            error = 1.0 if to_a > to_b else 0.5 if to_a == to_b else 0.0
            cells[a.phone, b.phone, a.speaker, x.speaker, a.context].append(error)
    of_speaker, of_pair = defaultdict(list), defaultdict(list)
    for (a, b, speaker, *_), errors in cells.items():
        of_speaker[a, b, speaker].append(fmean(errors))
    for (a, b, _), errors in of_speaker.items():
        of_pair[a, b].append(fmean(errors))
    if not cells:
        return None
    triples = sum(map(len, cells.values()))
    error = fmean(fmean(errors) for errors in of_pair.values())
    return AbxRate(error=error, triples=triples, cells=len(cells), phone_pairs=len(of_pair))


def check(found: AbxRate | None, expected: AbxRate | None) -> None:
    if expected is None or found is None:
        assert found is expected
        return
    assert found.error == pytest.approx(expected.error, abs=1e-12)
    assert dataclasses.replace(found, error=0.0) == dataclasses.replace(expected, error=0.0)


def random_items(
    random: np.random.Generator, number: int, *, phones: int, speakers: int, contexts: int, units: int
) -> list[AbxItem]:
    return [
        AbxItem(
            phone=f"p{random.integers(phones)}",
            context=(f"c{random.integers(contexts)}", "e"),
            speaker=f"s{random.integers(speakers)}",
            units=random.integers(0, units, random.integers(1, 6)).astype(np.uint16),
        )
        for _ in range(number)
    ]


SEQUENCE = st.lists(st.integers(0, K - 1), min_size=1, max_size=5)


@given(st.lists(st.tuples(SEQUENCE, SEQUENCE), min_size=1, max_size=6), st.integers(0, 9))
def test_the_best_of_every_path_is_found(pairs: list[tuple[list[int], list[int]]], seed: int) -> None:
    distances = table(seed)
    sequences = [np.array(sequence) for pair in pairs for sequence in pair]
    indices = np.arange(len(sequences)).reshape(-1, 2)
    best = [min(every_path(x, y, distances)) for x, y in pairs]
    assert dtw_distances(sequences, indices, distances).tolist() == [total / length for total, length in best]


def test_long_sequences_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    sequences = [random.integers(0, K, random.integers(1, 40)).astype(np.uint16) for _ in range(30)]
    pairs = random.integers(0, 30, (150, 2))
    found = dtw_distances(sequences, pairs, table(1))
    assert found.tolist() == [slow_dtw(sequences[x], sequences[y], table(1)) for x, y in pairs]
    assert np.array_equal(found, dtw_distances(sequences, pairs[:, ::-1], table(1)))
    monkeypatch.setattr(dtw, "_CELLS", 100)  # two long pairs at a time, a hundred of the shortest
    assert np.array_equal(found, dtw_distances(sequences, pairs, table(1)))


def test_angles_between_centroids() -> None:
    centroids = np.array([[1, 0], [3, 0], [0, 2], [-1, 0], [1, 3**0.5], [0, 0]], np.float32)
    expected = [0, 0, 1 / 2, 1, 1 / 3, 1]
    found = angular_distances(centroids)
    assert found[0] == pytest.approx(expected, abs=1e-7)
    assert np.array_equal(found, found.T)
    assert np.array_equal(np.diag(found), np.zeros(6))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_triples_are_those_of_a_loop_over_all(
    seed: int, number: int, phones: int, speakers: int, contexts: int
) -> None:
    random = np.random.default_rng(seed)
    items = random_items(random, number, phones=phones, speakers=speakers, contexts=contexts, units=K)
    found = abx_errors(items, table(seed), max_items=number, max_speakers=number)
    check(found.within, slow_rate(items, table(seed), across=False))
    check(found.across, slow_rate(items, table(seed), across=True))
    assert (found.items, found.speakers) == (number, len({item.speaker for item in items}))


def test_units_that_are_the_phones_make_no_error() -> None:
    random = np.random.default_rng(0)
    items = random_items(random, 200, phones=K, speakers=3, contexts=2, units=K)
    items = [dataclasses.replace(item, units=np.full(len(item.units), int(item.phone[1]))) for item in items]
    for distances in (identity_distances(K), angular_distances(random.standard_normal((K, 8)))):
        found = abx_errors(items, distances)
        assert found.within is not None
        assert found.across is not None
        assert (found.within.error, found.across.error) == (0, 0)
        assert found.within.phone_pairs == found.across.phone_pairs == K * (K - 1)


def test_one_unit_for_all_is_chance_exactly_and_random_units_nearly() -> None:
    items = random_items(np.random.default_rng(0), 600, phones=3, speakers=4, contexts=2, units=50)
    same = abx_errors([dataclasses.replace(item, units=item.units * 0) for item in items], identity_distances(50))
    chance = abx_errors(items, angular_distances(np.random.default_rng(1).standard_normal((50, 8))))
    for found, tolerance in ((same, 0), (chance, 0.03)):
        assert found.within is not None
        assert found.across is not None
        assert (found.within.error, found.across.error) == pytest.approx((0.5, 0.5), abs=tolerance)


def test_one_speaker_has_no_across() -> None:
    found = abx_errors(random_items(np.random.default_rng(0), 20, phones=2, speakers=1, contexts=1, units=K), table(0))
    assert found.across is None
    assert found.within is not None
    assert found.speakers == 1


def test_draws_bound_the_triples_and_depend_on_the_seed() -> None:
    random = np.random.default_rng(0)
    items = [
        AbxItem(phone=phone, context=("c", "e"), speaker=speaker, units=random.integers(0, K, 4))
        for phone, speaker, _ in itertools.product("ab", "stuv", range(5))
    ]
    found = abx_errors(items, table(0), max_items=2, max_speakers=1)
    assert found.within is not None
    assert found.across is not None
    # Ordered pairs of phones, speakers, X and A, B; across, one other speaker.
    assert found.within.triples == 2 * 4 * (2 * 1) * 2
    assert found.across.triples == 2 * 4 * (2 * 2) * 2
    assert found == abx_errors(items, table(0), max_items=2, max_speakers=1)
    assert found != abx_errors(items, table(0), max_items=2, max_speakers=1, seed=1)


def test_names_do_not_matter() -> None:
    random = np.random.default_rng(0)
    items = random_items(random, 120, phones=3, speakers=4, contexts=2, units=K)
    order = random.permutation(K)
    new = {"p0": "z", "p1": "a", "p2": "m", "s0": "9", "s1": "1", "s2": "5", "s3": "0", "c0": "y", "c1": "b"}
    renamed = [
        AbxItem(
            phone=new[item.phone], context=(new[item.context[0]], "?"), speaker=new[item.speaker],
            units=order[item.units],
        )
        for item in items
    ]  # fmt: skip
    distances = np.empty((K, K))
    distances[np.ix_(order, order)] = table(0)
    expected = abx_errors(items, table(0), max_items=2, max_speakers=1)
    assert abx_errors(renamed, distances, max_items=2, max_speakers=1) == expected


def test_silence_breaks_contexts() -> None:
    def phone(start: float, end: float, label: str) -> Phone:
        return Phone(start=start, end=end, label=label)

    # 10 ms between B and C are rounding; 30 ms after D are a pause.
    phones = [phone(0.1, 0.2, "A"), phone(0.2, 0.3, "B"), phone(0.31, 0.4, "C"), phone(0.4, 0.5, "D")]
    phones += [phone(0.53, 0.6, "E"), phone(0.6, 0.7, "F")]
    expected = [
        Triphone(start=0.1, end=0.4, label="B", context=("A", "C")),
        Triphone(start=0.2, end=0.5, label="C", context=("B", "D")),
    ]
    assert triphones(phones) == triphones(phones[::-1]) == expected
    assert triphones(phones[:2]) == []
    # Centers are 10, 30, 50 ... ms.
    assert frames_between(0.1, 0.2, 99, 50.0) == range(5, 10)
    assert frames_between(0.05, 0.2, 7, 50.0) == range(2, 7)
    assert frames_between(0.2, 0.3, 7, 50.0) == range(0)
    assert frames_between(0.0, 0.1 + 0.05, 99, 50.0) == range(7)  # the sum is a little more than 0.15


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/units of a small run."""
    folder = tmp_path_factory.mktemp("world")
    manifest = small_world.make_corpus(folder / "corpus")
    recipe = small_world.write_recipe(folder / "recipe.yaml", manifest, small_world.make_backbone(folder / "backbone"))
    assert main(["run", str(recipe), "--until", "units", "--out", str(folder / "run")]) == 0
    return folder / "run" / "units"


def write_ctm(path: Path, units: Path, *, middle: str = "{length}") -> Path:
    """Three phones to each word of 0.15 s, the middle one for words of its length; 0.03 s of silence after it."""
    path.write_text(
        "".join(
            f"{u.id} 1 {0.18 * index + 0.05 * place:.2f} 0.05 {label}\n"
            for u in read_units(units, "train")
            for index, word in enumerate(u.text.split())
            for place, label in enumerate(("B", middle.format(length=len(word), id=u.id, index=index), "E"))
        )
    )
    return path


@pytest.mark.parametrize("distance", ["angular", "identity"])
def test_the_command_measures_what_a_loop_does(
    units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], distance: str
) -> None:
    utterances = list(read_units(units, "train"))
    items = []
    for u in utterances:
        frames = expand(u.units, u.durations)
        centers = (np.arange(len(frames)) + 0.5) / 50
        for index, word in enumerate(u.text.split()):
            said = (centers >= round(0.18 * index, 2)) & (centers < round(0.18 * index + 0.15, 2))
            items.append(AbxItem(phone=str(len(word)), context=("B", "E"), speaker=u.speaker, units=frames[said]))
    centroids = KMeans.load(units / "kmeans.safetensors").centroids.astype(float)
    directions = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    angles = np.arccos(np.minimum(directions @ directions.T, 1 - 1e-16)) / np.pi
    distances = np.round(angles * 2**24) / 2**24 if distance == "angular" else 1 - np.eye(len(centroids))
    ctm = write_ctm(tmp_path / "phones.ctm", units)
    command = ["score", "units", str(units), "--split", "train", "--alignments", str(ctm), "--abx"]
    assert main([*command, distance] if distance != "angular" else command) == 0
    printed = dict(line.split("\t", 1) for line in capsys.readouterr().out.splitlines())
    for name in ("within", "across"):
        rate = slow_rate(items, distances, across=name == "across")
        assert rate is not None
        assert 0.05 < rate.error < 0.5
        counts = f"{rate.triples} triples, {rate.phone_pairs} ordered pairs of phones"
        assert printed[f"ABX {name}"] == f"{100 * rate.error:.2f} %\t{counts}"
    assert printed["ABX items"] == f"{len(items)}\t3 speakers, {2 * len(items)} phones left out"


def test_what_cannot_be_compared_is_said(
    units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctm = write_ctm(tmp_path / "phones.ctm", units)
    command = ["score", "units", str(units), "--split", "train", "--abx"]
    assert main(command) == 2
    assert "ABX compares phones: give their --alignments too" in capsys.readouterr().err
    command += ["angular", "--alignments"]
    only = tmp_path / "one.ctm"
    first = {u.id for u in read_units(units, "train") if u.speaker == "s0"}
    only.write_text("".join(line for line in ctm.read_text().splitlines(True) if line.split()[0] in first))
    assert main([*command, str(only)]) == 0
    assert "ABX across\tnone\tall phones are by one speaker" in capsys.readouterr().out
    once = write_ctm(tmp_path / "once.ctm", units, middle="{id}-{index}")
    assert main([*command, str(once)]) == 2
    assert "ABX finds nothing to compare in split 'train': of " in capsys.readouterr().err
    assert main([*command, str(ctm), "--seed", "-1"]) == 2
    assert "'-1' is not a whole number" in capsys.readouterr().err
    nameless = [dataclasses.replace(u, speaker="") for u in read_units(units, "train")]
    with monkeypatch.context() as patch:
        patch.setattr(unit_score, "read_units", lambda *_, **__: nameless)
        assert main([*command, str(ctm)]) == 2
    assert "has no speaker, which ABX needs" in capsys.readouterr().err
    kmeans = KMeans.load(units / "kmeans.safetensors")
    other = dataclasses.replace(kmeans, centroids=kmeans.centroids[::-1].copy())
    monkeypatch.setattr(unit_score.KMeans, "load", lambda path: other)
    assert main([*command, str(ctm)]) == 2
    assert f"but {other.fingerprint} is expected" in capsys.readouterr().err
