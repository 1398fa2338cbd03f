"""ABX: is a phone nearer to itself, said once more, than to another phone in the same place?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
from jaxtyping import Float, Float64, Integer

from sparq.evaluation.dtw import dtw_distances
from sparq.progress import progress

MAX_ITEMS = 10
MAX_SPEAKERS = 5
"""Libri-light's bounds (`--max_size_group`, `--max_x_across` of its eval_ABX.py)."""

_PAIRS_PER_BATCH = 1 << 19

_Groups = dict[int, dict[int, list[int]]]
"""The items of one context: speaker to phone to indices of items."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AbxItem:
    """A phone as it was said once.

    Attributes:
        phone: what is to be told apart.
        context: the phones before and after it.
        speaker: who says it.
        units: of the frames of all three phones.
    """

    phone: str
    context: tuple[str, str]
    speaker: str
    units: Integer[np.ndarray, "_frames"]


@dataclass(frozen=True, kw_only=True)
class AbxRate:
    """How often the wrong one of two is nearer.

    Attributes:
        error: mean error of ordered pairs of phones; 0 to 1, chance is 0.5.
        triples: triples that were compared.
        cells: combinations of context, speakers and ordered pair of phones.
        phone_pairs: ordered pairs of phones.
    """

    error: float
    triples: int
    cells: int
    phone_pairs: int


@dataclass(frozen=True, kw_only=True)
class AbxErrors:
    """Both error rates.

    Attributes:
        within: all three by one speaker; None if no speaker says two phones in one context, one of them twice.
        across: X by another speaker; None if no two speakers say what that takes.
        speakers: distinct speakers.
        items: how many there were to draw from.
    """

    within: AbxRate | None
    across: AbxRate | None
    speakers: int
    items: int


@dataclass(frozen=True, eq=False)
class _Block:
    """All cells of one phone A, speaker of A and B, speaker of X and context.

    Attributes:
        speaker: of A and B.
        phone: of A and X.
        x: items that are X.
        said: items by phone of the speaker of A and B, A among them.
    """

    speaker: int
    phone: int
    x: Sequence[int]
    said: Mapping[int, Sequence[int]]

    @property
    def pairs(self) -> Integer[np.ndarray, "pairs 2"]:
        """Each X with each of what is said."""
        said = [index for found in self.said.values() for index in found]
        return np.stack([np.repeat(self.x, len(said)), np.tile(said, len(self.x))], axis=1)


def angular_distances(centroids: Float[np.ndarray, "units dim"]) -> Float64[np.ndarray, "units units"]:
    """Return the angles between centroids, arccos(cosine) / pi, as Libri-light's: 0 to 1.

    A centroid of zeros has no direction: it is 1 away from all others.
    """
    norms = np.linalg.norm(centroids.astype(np.float64), axis=1)
    directions = centroids / np.where(norms > 0, norms, 1)[:, None]
    angles = np.arccos(np.clip(directions @ directions.T, -1, 1)) / np.pi
    angles[norms == 0], angles[:, norms == 0] = 1, 1
    # The rounded cosine of a vector with itself may be below 1, and arccos is steep there.
    np.fill_diagonal(angles, 0)
    return angles


def identity_distances(num_units: int) -> Float64[np.ndarray, "units units"]:
    """Return 0 for a unit and itself, 1 for any other."""
    return 1 - np.eye(num_units)


def abx_errors(
    items: Sequence[AbxItem],
    distances: Float[np.ndarray, "units units"],
    *,
    max_items: int = MAX_ITEMS,
    max_speakers: int = MAX_SPEAKERS,
    seed: int = 0,
) -> AbxErrors:
    """Return how often phones are mistaken for others of the same context (Schatz et al. 2013).

    A and X are two items of phone a, B is one of phone b, all in one context (phones before and after). With d the
    mean distance of frames along the best alignment (`dtw_distances`), a triple's error is

        1 if d(A, X) > d(B, X), 1/2 if they are equal, 0 otherwise.

    A cell is a context, a speaker of A and B, a speaker of X, and the ordered pair (a, b). Means are taken as
    Libri-light does (Kahn et al. 2020; eval_ABX.py): over the triples of a cell; over the cells of (speaker of A and
    B, a, b), which are contexts and speakers of X together; over the speakers of A and B; and over ordered pairs
    (a, b). Each mean is over what exists, without weights.

    Args:
        items: phones in context; each with at least one frame.
        distances: symmetric distance of two units, 0 to 1.
        max_items: items that are drawn of a context, speaker and phone.
        max_speakers: speakers of X that are drawn for a context, a phone and the speaker of A and B.
        seed: of these draws.
    """
    random = np.random.default_rng(seed)
    phones: dict[str, int] = {}
    speakers: dict[str, int] = {}
    contexts: dict[tuple[str, str], _Groups] = {}
    # Everything is in the order in which it first comes, so that other names change nothing.
    for index, item in enumerate(items):
        phone = phones.setdefault(item.phone, len(phones))
        speaker = speakers.setdefault(item.speaker, len(speakers))
        contexts.setdefault(item.context, {}).setdefault(speaker, {}).setdefault(phone, []).append(index)
    for said in (said for groups in contexts.values() for said in groups.values()):
        for phone, found in said.items():
            if len(found) > max_items:
                said[phone] = [found[i] for i in random.choice(len(found), max_items, replace=False)]
    units = [item.units for item in items]
    within = _blocks("ABX within", contexts, _within)
    across = _blocks("ABX across", contexts, partial(_across, max_speakers=max_speakers, random=random))
    return AbxErrors(
        within=_rate(within, units, distances),
        across=_rate(across, units, distances),
        speakers=len(speakers),
        items=len(items),
    )


def _blocks(
    label: str, contexts: Mapping[tuple[str, str], _Groups], of_context: Callable[[_Groups], Iterator[_Block]]
) -> Iterator[_Block]:
    with progress(label, len(contexts), "context") as bar:
        for groups in contexts.values():
            yield from of_context(groups)
            bar.update()


def _within(groups: _Groups) -> Iterator[_Block]:
    for speaker, said in groups.items():
        if len(said) > 1:
            for phone, found in said.items():
                if len(found) > 1:
                    yield _Block(speaker, phone, found, said)


def _across(groups: _Groups, max_speakers: int, random: np.random.Generator) -> Iterator[_Block]:
    for speaker, said in groups.items():
        if len(said) > 1:
            for phone in said:
                others = [other for other in groups if other != speaker and phone in groups[other]]
                if len(others) > max_speakers:
                    others = [others[i] for i in random.choice(len(others), max_speakers, replace=False)]
                for other in others:
                    yield _Block(speaker, phone, groups[other][phone], said)


def _rate(
    blocks: Iterator[_Block],
    units: Sequence[Integer[np.ndarray, "_frames"]],
    distances: Float[np.ndarray, "units units"],
) -> AbxRate | None:
    """Compare all blocks and take the means."""
    sums: dict[tuple[int, int, int], float] = defaultdict(float)
    counts: Counter[tuple[int, int, int]] = Counter()
    num_triples = 0
    for batch, pairs in _batches(blocks):
        found = dtw_distances(units, np.concatenate(pairs), distances)
        ends = np.cumsum([len(of_block) for of_block in pairs])
        for block, of_block in zip(batch, np.split(found, ends[:-1]), strict=True):
            for phone_b, error, triples in _cells(block, of_block.reshape(len(block.x), -1)):
                key = (block.speaker, block.phone, phone_b)
                sums[key] += error
                counts[key] += 1
                num_triples += triples
    if not counts:
        return None
    of_speakers: dict[tuple[int, int], list[float]] = defaultdict(list)
    for key, total in sums.items():
        of_speakers[key[1:]].append(total / counts[key])
    return AbxRate(
        error=fmean(fmean(errors) for errors in of_speakers.values()),
        triples=num_triples,
        cells=counts.total(),
        phone_pairs=len(of_speakers),
    )


def _batches(blocks: Iterator[_Block]) -> Iterator[tuple[list[_Block], list[Integer[np.ndarray, "_pairs 2"]]]]:
    """Yield blocks with their pairs, as many as fit into little memory."""
    batch: list[_Block] = []
    pairs: list[Integer[np.ndarray, "_pairs 2"]] = []
    num_pairs = 0
    for block in blocks:
        batch.append(block)
        pairs.append(block.pairs)
        num_pairs += len(pairs[-1])
        if num_pairs >= _PAIRS_PER_BATCH:
            yield batch, pairs
            batch, pairs, num_pairs = [], [], 0
    if batch:
        yield batch, pairs


def _cells(block: _Block, distance: Float64[np.ndarray, "x said"]) -> Iterator[tuple[int, float, int]]:
    """Yield phone b, the error and the number of triples of each cell of a block."""
    sizes = np.array([len(found) for found in block.said.values()])
    starts = np.cumsum(sizes) - sizes
    own = list(block.said).index(block.phone)
    to_a = distance[:, starts[own] : starts[own] + sizes[own], None]  # x a 1
    wrong = (to_a > distance[:, None]) + 0.5 * (to_a == distance[:, None])  # x a said
    num_ax = to_a.size
    if block.x is block.said[block.phone]:  # one speaker: no item is compared with itself
        wrong[np.arange(len(block.x)), np.arange(len(block.x))] = 0
        num_ax -= len(block.x)
    sums = np.add.reduceat(wrong.sum(axis=(0, 1)), starts)
    for phone_b, size, total in zip(block.said, sizes.tolist(), sums.tolist(), strict=True):
        if phone_b != block.phone:
            yield phone_b, total / (num_ax * size), num_ax * size
