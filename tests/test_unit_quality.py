"""Quality of units: closed forms, alignments as aligners write them, the command."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

import small_world
from sparq.audio.alignments import Phone, phones_of_frames, read_alignments
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import bit_rate, unit_quality
from sparq.units import read_units

CTM = """;; aligned
utt-1 1 0.00 0.10 sil
utt-1 1 0.10 0.05 D
utt-1 1 0.15 0.10 AO1
utt-2 A 0.0 1.0 K
"""
# Montreal Forced Aligner's output, cut short.
TEXT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.25
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.25
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = "door"
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.25
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = ""
        intervals [2]:
            xmin = 0.1
            xmax = 0.15
            text = "D"
        intervals [3]:
            xmin = 0.15
            xmax = 0.25
            text = "AO1"
"""


def test_a_unit_for_each_phone_knows_everything() -> None:
    found = unit_quality([("a", 3), ("b", 1), ("c", 0), ("a", 3)])
    assert (found.pnmi, found.phone_purity, found.cluster_purity) == pytest.approx((1, 1, 1))
    assert (found.phones, found.units, found.frames) == (3, 3, 4)


def test_one_unit_for_all_knows_nothing() -> None:
    found = unit_quality([("a", 0), ("a", 0), ("b", 0), ("c", 0)])
    assert found.pnmi == pytest.approx(0)
    assert (found.phone_purity, found.cluster_purity) == pytest.approx((0.5, 1))


def test_two_units_for_each_phone_split_its_frames() -> None:
    found = unit_quality([("a", 0), ("a", 1), ("b", 2), ("b", 3)])
    assert (found.pnmi, found.phone_purity, found.cluster_purity) == pytest.approx((1, 1, 0.5))


def test_a_unit_that_halves_four_phones_knows_half() -> None:
    found = unit_quality([("a", 0), ("b", 0), ("c", 1), ("d", 1)])
    assert found.pnmi == pytest.approx(0.5)  # one of two bits
    assert found.phone_purity == pytest.approx(0.5)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 4)), min_size=1, max_size=60))
def test_the_information_is_scikit_learns(pairs: list[tuple[str, int]]) -> None:
    found = unit_quality(pairs)
    phones, units = zip(*pairs, strict=True)
    shares = np.unique(phones, return_counts=True)[1] / len(phones)
    entropy = -(shares * np.log(shares)).sum()
    expected = mutual_info_score(phones, units) / entropy if entropy > 0 else 0.0
    assert found.pnmi == pytest.approx(expected, abs=1e-9)
    most = sum(max(pairs.count((p, u)) for p in "abcde") for u in range(5))
    assert found.phone_purity == pytest.approx(most / len(pairs))


def test_bit_rates() -> None:
    even = bit_rate([np.arange(8), np.arange(8)], seconds=0.5)
    assert (even.entropy, even.units_per_second, even.bits_per_second) == pytest.approx((3, 32, 96))
    assert bit_rate([np.zeros(9, int)], seconds=1.0).bits_per_second == 0
    skewed = bit_rate([np.array([0, 0, 0, 1])], seconds=4.0)
    assert skewed.bits_per_second == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert skewed.used == 2


def test_alignments_are_read_as_aligners_write_them(tmp_path: Path) -> None:
    door = [Phone(start=0.10, end=0.10 + 0.05, label="D"), Phone(start=0.15, end=0.15 + 0.10, label="AO")]
    (tmp_path / "phones.ctm").write_text(CTM)
    assert read_alignments(tmp_path / "phones.ctm") == {"utt-1": door, "utt-2": [Phone(start=0.0, end=1.0, label="K")]}
    (tmp_path / "grids" / "speaker").mkdir(parents=True)
    (tmp_path / "grids" / "speaker" / "utt-1.TextGrid").write_text(TEXT_GRID)
    (found,) = read_alignments(tmp_path / "grids").values()
    assert found == [Phone(start=0.1, end=0.15, label="D"), Phone(start=0.15, end=0.25, label="AO")]


def test_a_frame_has_the_phone_at_its_center() -> None:
    phones = [Phone(start=0.10, end=0.15, label="D"), Phone(start=0.15, end=0.25, label="AO")]
    # Centers are 10, 30, 50 ... ms; that of 0.15 s belongs to the phone that begins there.
    assert phones_of_frames(phones, 14, 50.0) == [None] * 5 + ["D", "D", "AO", "AO", "AO", "AO", "AO", None, None]
    assert phones_of_frames(phones, 6, 50.0) == [None] * 5 + ["D"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.ctm", "utt-1 1 0.0 D\n", r"a.ctm, line 1 is 'utt-1 1 0.0 D': expected UTTERANCE"),
        ("g/a.TextGrid", TEXT_GRID.replace('"phones"', '"letters"'), "has no tier named phones"),
        ("g/a.txt", "", "has no .TextGrid file"),
    ],
)
def test_faulty_alignments_are_a_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(SparqError, match=message):
        read_alignments(file if file.suffix == ".ctm" else file.parent)


def test_the_command_scores_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = small_world.make_corpus(tmp_path / "corpus")
    backbone = small_world.make_backbone(tmp_path / "backbone")
    recipe = small_world.write_recipe(tmp_path / "recipe.yaml", manifest, backbone)
    assert main(["run", str(recipe), "--until", "units", "--out", str(tmp_path / "run")]) == 0
    utterances = list(read_units(tmp_path / "run" / "units", "test"))
    # A word lasts 0.15 s and a pause 0.03 s. The first utterance has no alignment.
    lines = [
        f"{u.id.removeprefix('small-')} 1 {0.18 * index:.2f} 0.15 {word}"
        for u in utterances[1:]
        for index, word in enumerate(u.text.split())
    ]
    (tmp_path / "words.ctm").write_text("\n".join(lines))
    command = ["score", "units", str(tmp_path / "run" / "units")]
    assert main(command) == 0
    rate = capsys.readouterr().out
    written = sum(len(u.units) for u in utterances)
    assert f"{written / sum(u.seconds for u in utterances):.2f} units/s" in rate
    assert main([*command, "--alignments", str(tmp_path / "words.ctm")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(rate)
    assert f"{len(utterances) - 1} of {len(utterances)} utterances aligned" in printed
    scores = {line.split("\t")[0]: float(line.split("\t")[1].split()[0]) for line in printed.splitlines()}
    assert 0 < scores["PNMI"] <= 1
    assert 0 < scores["phone purity"] <= 1
    (tmp_path / "other.ctm").write_text("nobody 1 0 1 K\n")
    assert main([*command, "--alignments", str(tmp_path / "other.ctm")]) == 2
    assert "fits an utterance of split 'test': it has 'nobody', the units 'small-" in capsys.readouterr().err
