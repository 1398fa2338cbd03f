import base64
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparq.report import (
    FRAMEWORKS,
    PRECISIONS,
    AsrSplit,
    AttentionMap,
    AudioSample,
    CurvePoint,
    ErrorRate,
    Example,
    HiddenMap,
    LayerOutliers,
    LiveSlice,
    Outliers,
    Perplexity,
    Provenance,
    Results,
    Row,
    SplitSummary,
    TaskOutliers,
    TrainingCurve,
    matrix,
    render_html,
    render_terminal,
    summarize,
    write_html,
)
from sparq.report.align import align
from sparq.report.numbers import precision_label, show_bytes, show_change, show_number, show_seconds
from sparq.report.svg import printable
from sparq.report.tables import WIDTH, draw, main_table, prose_table

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \"quoted\""
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(28)
CHANNELS = np.linspace(0, 3.3, 6 * 16).reshape(6, 16)
TOKENS = ("<startofspeech>", "\u4e11\u4e22", "▁six", "$x_1$", "\u0627\ue000\n", "</svg><script>")


def row(index: int, framework: str, precision: str, **changes: object) -> Row:
    """A row whose numbers differ from those of every other row."""
    value = 10 + index + index / 100
    examples = (Example(id="an4-1", reference="go to six", hypothesis=HOSTILE if index % 2 else "go six"),)
    split = AsrSplit(wer=value + 2, words=773, utterances=130, errors=90 + index, examples=examples)
    metrics = {
        "textlm_ppl": Perplexity(value=value, tokens=1234, utterances=19, split="test"),
        "speechlm_ppl": Perplexity(value=value + 1000, tokens=5678, utterances=19, split="test"),
        "asr_wer": ErrorRate(value=value + 2, errors=90, length=773, utterances=130, split="test"),
        "tts_uer": ErrorRate(value=value + 30, errors=900, length=7730, utterances=130, split="test"),
        "asr": {"test": split, "test-unseen-voice": split},
        "prose_ppl": Perplexity(value=value * 40, tokens=4092, utterances=4, split="prose"),
        "outliers": outliers(24_600 / (1 + index)),
        "seconds": 61.0,
    }
    return Row(framework=framework, precision=precision, **{**metrics, **changes})


def outliers(norm: float) -> Outliers:
    layers = tuple(LayerOutliers(layer=i, max_inf_norm=norm / (3 - i), kurtosis=norm * 5) for i in range(3))
    return Outliers(
        max_inf_norm=norm, mean_kurtosis=norm * 5, attention_mass=0.9, first_token_share=0.25, sink_rate=0.375,
        attention_entropy=1.5, max_logit=23.25, first_value_norm=0.75, sink_value_norm=None, other_value_norm=6.75,
        tokens=999, final_norm_max_inf_norm=88.0, per_layer=layers,
        by_task={
            name: TaskOutliers(max_inf_norm=norm / part, mean_kurtosis=norm / part / 7, tokens=111 * part)
            for part, name in enumerate(("TextLM", "SpeechLM", "ASR"), 2)
        },
    )  # fmt: skip


def full_results(folder: Path, **changes: object) -> Results:
    (folder / "clip.wav").write_bytes(WAV)
    (folder / "secret.txt").write_text("not audio")
    (folder / "long.wav").write_bytes(WAV + bytes(200_000))
    points = tuple(
        CurvePoint(
            update=u, tokens=u * 10, seconds=u / 2, loss=3 / (1 + u), lr=1e-4,
            valid_accuracy=u / 100 if u % 10 == 0 else None,
        )
        for u in range(1, 41)
    )  # fmt: skip
    causal = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    values = {
        "name": HOSTILE,
        "created": "2026-01-01T00:00:00+00:00",
        "provenance": Provenance(
            git_hash="0123456789abcdef", git_dirty=True, packages={"python": "3.11.9", "torch": "2.13.0"},
            platform="Linux", cpu="EPYC", num_cpus=2, num_threads=1, memory_bytes=2**33,
            command=("sparq", HOSTILE),
        ),
        "seed": 7,
        "settings": {"lora": {"rank": 128}, "note": HOSTILE},
        "corpus": {"train": SplitSummary(hours=2.41, utterances=2310, speakers=74)},
        "rows": tuple(
            row(i * len(PRECISIONS) + j, framework, precision)
            for i, framework in enumerate(FRAMEWORKS)
            for j, precision in enumerate(PRECISIONS)
        ),
        "wall_seconds": {"units": 41.2, "train": 7321.0},
        "peak_memory_bytes": {"units": 2**30},
        "curves": {
            f: TrainingCurve(points=points, live=LiveSlice(points=points[:8], max_abs_difference=3.1e-7))
            for f in FRAMEWORKS
        },
        "attention_maps": tuple(
            AttentionMap(
                framework=f, layer=1, head=2, weights=matrix(causal), values=matrix(CHANNELS), outputs=matrix(CHANNELS),
                labels=TOKENS,
            )
            for f in FRAMEWORKS
        ),
        "hidden_maps": tuple(
            HiddenMap(framework=f, norms=matrix(np.arange(18.0).reshape(6, 3)), labels=TOKENS)
            for f in FRAMEWORKS
        ),
        "audio": tuple(
            AudioSample(
                id=path, path=path, reference="go to six", hypotheses={"vanilla-full": HOSTILE, "other": "go"}
            )
            for path in ("clip.wav", "secret.txt", "long.wav", "gone.wav")
        ),
        "notes": (HOSTILE, "TTS audio was not measured."),
    }  # fmt: skip
    return Results(**{**values, **changes})


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open:
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return full_results(folder)


@pytest.fixture(scope="module")
def html(results: Results, folder: Path) -> str:
    return render_html(results, folder=folder)


@pytest.fixture
def page(html: str) -> Page:
    return Page(html)


def test_the_page_needs_nothing_else(page: Page):
    loaded = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "formaction"}
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in loaded:
                assert value.startswith(("#", "data:")), (tag, name, value)
            if name == "style":
                assert not re.search(r"url\((?!#)", value)
    style = "".join(page.text[: page.text.index("Skip to the content")])
    assert "@import" not in style
    assert "url(" not in style


def test_hostile_text_is_shown_and_does_nothing(page: Page, html: str):
    assert "<script" not in html
    assert "".join(page.text).count("<script>alert('x')</script>") > 5
    assert any("</svg>" in text for text in page.text)


def test_every_number_of_every_row_is_there(page: Page, results: Results):
    for found in results.rows:
        for metric in (found.textlm_ppl, found.speechlm_ppl, found.asr_wer, found.tts_uer):
            assert show_number(metric.value) in page.cells
        assert any(cell.startswith(show_number(found.prose_ppl.value)) for cell in page.cells)
        assert show_number(found.outliers.max_inf_norm) in page.cells
        split = found.asr["test-unseen-voice"]
        assert f"{show_number(split.wer)} ({split.errors}/773)" in page.cells


def test_ids_are_unique_and_links_lead_somewhere(page: Page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert sorted(ids) == sorted(set(ids))
    links = [v[1:] for _, a in page.tags for k, v in a.items() if k in ("href", "xlink:href") and v[0] == "#"]
    links += re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for _, a in page.tags for v in a.values()))
    assert set(links) <= set(ids)
    assert len(links) > 20


def test_the_page_is_accessible(page: Page):
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in attributes for attributes in page.all("th"))
    assert len(page.all("figure")) == 6
    pictures = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == 6
    assert all(len(a["aria-label"]) > 40 for a in pictures)
    assert all(a["aria-label"] for a in page.all("audio"))
    assert len(page.all("caption")) >= 6


def test_figures_keep_text_as_text_and_follow_the_page(page: Page, html: str):
    text = " ".join(page.text)
    for word in ("Max inf norm by layer", "Validation accuracy", "u17u34", "$x_1$", "␣six", "□□"):
        assert word in text
    assert "#0102" not in html
    assert "fill: currentColor" in html
    assert "var(--blue)" in html


def test_drawing_is_reproducible_and_restores_matplotlib(html: str, results: Results, folder: Path):
    before = dict(mpl.rcParams)
    assert render_html(results, folder=folder) == html
    assert dict(mpl.rcParams) == before


def test_audio_is_embedded_unchanged_or_its_absence_explained(page: Page):
    (player,) = page.all("audio")
    kind, _, data = player["src"].partition(";base64,")
    assert kind == "data:audio/wav"
    assert base64.b64decode(data) == WAV
    text = " ".join(page.text)
    assert "Not embedded: secret.txt is no Ogg, WAV, FLAC or MP3 file" in text
    assert "Not embedded: long.wav has 195 KiB, more than 195 KiB" in text
    assert "Not embedded: there is no file gone.wav" in text


def test_a_report_of_next_to_nothing(tmp_path: Path):
    bare = full_results(
        tmp_path,
        rows=(Row(framework="vanilla", precision="full"),),
        wall_seconds={}, peak_memory_bytes={}, curves={}, attention_maps=(), hidden_maps=(), audio=(),
        notes=(),
    )  # fmt: skip
    write_html(tmp_path / "out" / "report.html", bare, folder=tmp_path)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.all("figure") == []
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "No number of this run supports a summary." in " ".join(page.text)
    assert "TTS UER: not measured." in render_terminal(bare)


def test_broken_models_are_drawn(tmp_path: Path):
    exploded = Perplexity(value=math.inf, tokens=1234, utterances=19, split="test")
    undefined = Perplexity(value=math.nan, tokens=1234, utterances=19, split="test")
    rows = (
        row(0, "vanilla", "full"),
        row(1, "vanilla", "w4a4-rtn", textlm_ppl=exploded, prose_ppl=undefined, outliers=outliers(math.inf)),
        row(2, "softmax1", "full", textlm_ppl=undefined, prose_ppl=exploded, outliers=outliers(math.nan)),
        row(3, "my_own", "w3a3-gptq", speechlm_ppl=None),
    )
    hidden = HiddenMap(framework="vanilla", norms=((0.0, math.inf), (math.nan, 0.0)), labels=("a", "b"))
    nothing = CurvePoint(update=1, tokens=1, seconds=1.0, loss=math.nan, lr=0.1)
    broken = full_results(
        tmp_path, rows=rows, hidden_maps=(hidden,), curves={"vanilla": TrainingCurve(points=(nothing,))}
    )
    page = Page(render_html(broken, folder=tmp_path))
    assert {"inf", "nan", "+inf"} <= set(page.cells)
    assert "not logged" in " ".join(page.text)
    terminal = render_terminal(broken)
    assert "Drop leaves out TextLM PPL" not in terminal
    assert "No drop for my_own: it has no row at full precision." in terminal


def test_the_terminal_table_is_aligned_and_fits(results: Results):
    text = render_terminal(results)
    assert max(map(len, text.splitlines())) <= WIDTH
    lines = draw(main_table(results)).splitlines()
    ends = {len(line) for line in lines[1:] if line.startswith(("-", *FRAMEWORKS))}
    assert len(ends) == 1
    assert text.isascii() or HOSTILE in text


def test_the_widest_numbers_fit_too():
    def huge(name: str, precision: str) -> Row:
        ppl = Perplexity(value=123_456.7, tokens=10**9, utterances=10**6, split="test-unseen-voice")
        return row(0, name, precision, textlm_ppl=ppl, speechlm_ppl=ppl, prose_ppl=ppl)

    rows = tuple(huge(f, p) for f in FRAMEWORKS for p in PRECISIONS)
    text = "\n".join(draw(table) for table in (main_table(_bare(rows)), prose_table(_bare(rows))))
    assert max(map(len, text.splitlines())) <= WIDTH


def _bare(rows: tuple[Row, ...]) -> Results:
    return Results(
        name="n", created="c", seed=0, settings={}, corpus={}, rows=rows,
        provenance=Provenance(
            git_hash="unknown", git_dirty=None, packages={}, platform="p", cpu="c", num_cpus=1, num_threads=1,
            memory_bytes=1, command=(),
        ),
    )  # fmt: skip


def _four(framework: str, precision: str, value: float, **changes: object) -> Row:
    return row(
        0, framework, precision,
        **{
            "textlm_ppl": Perplexity(value=value, tokens=1, utterances=1, split="test"),
            "speechlm_ppl": Perplexity(value=value, tokens=1, utterances=1, split="test"),
            "asr_wer": ErrorRate(value=value, errors=1, length=1, utterances=1, split="test"),
            "tts_uer": ErrorRate(value=value, errors=1, length=1, utterances=1, split="test"),
            **changes,
        },
    )  # fmt: skip


@pytest.mark.parametrize(("vanilla", "softmax1", "best"), [(40, 15, "softmax1"), (15, 40, "vanilla")])
def test_the_summary_names_whoever_loses_least(vanilla, softmax1, best):
    rows = [_four(f, "full", 10.0) for f in ("vanilla", "softmax1")]
    rows += [_four("vanilla", "w4a4-rtn", vanilla), _four("softmax1", "w4a4-rtn", softmax1)]
    rows += [_four("vanilla", "w8a8-rtn", 10), _four("softmax1", "w8a8-rtn", 99)]
    sentences = "\n".join(summarize(_bare(tuple(rows))))
    assert f"At W4A4 RTN, {best} loses least against its own full precision: +50.00 % on average over 4/4" in sentences
    assert "against +300.0 %" in sentences
    assert f"{best} recognizes speech best: 15.00 % WER" in sentences
    assert "W8A8" not in sentences


def test_the_summary_ranks_neither_ties_nor_different_metrics():
    rows = [_four(f, "full", 10.0) for f in ("vanilla", "softmax1")]
    tie = summarize(_bare((*rows, *(_four(f, "w4a4-rtn", 20) for f in ("vanilla", "softmax1")))))
    assert any("no framework alone loses least" in s for s in tie)
    assert not any("recognizes speech best" in s for s in tie)
    missing = (_four("vanilla", "w4a4-rtn", 20), _four("softmax1", "w4a4-rtn", 15, tts_uer=None))
    assert any("do not compare: vanilla +100.0 % (4/4) and softmax1 +50.00 % (3/4)" in s
               for s in summarize(_bare((*rows, *missing))))  # fmt: skip
    table = main_table(_bare((*rows, *missing)))
    assert not any(line.strong for group in table.groups for line in group)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"), (0, "0.00"), (12.4, "12.40"), (99.996, "100.0"), (348.24, "348.2"), (999.96, "1,000"),
        (12_700.4, "12,700"), (999_999.7, "1.0e6"), (1.34e7, "1.3e7"), (2e120, "2.0e120"), (-5.5, "-5.50"),
        (3.1e-7, "3.1e-7"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_take_few_characters(value, shown):
    assert show_number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_shown_numbers_are_near_and_short(value):
    text = show_number(value)
    assert len(text) <= 9
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.05, abs=0.00501)


def test_other_labels():
    assert [show_change(x) for x in (None, 0, -3, 197.31)] == ["-", "0.00", "-3.00", "+197.3"]
    assert [show_seconds(x) for x in (8.44, 59.96, 725, 7380)] == [
        "8.4 s",
        "1 min 00 s",
        "12 min 05 s",
        "2 h 03 min",
    ]
    assert [show_bytes(x) for x in (2**12, 2**22, 2**31)] == ["4 KiB", "4 MiB", "2.00 GiB"]
    assert [precision_label(x) for x in PRECISIONS] == [
        "full", "W8A8 RTN", "W8A8 SmoothQuant", "W4A4 RTN", "W4A4 SmoothQuant",
    ]  # fmt: skip
    assert printable("a" * 30) == "a" * 13 + "…"


words = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=5).map(" ".join)


@given(words, words)
def test_alignment_holds_both_texts_and_fewest_edits(reference, hypothesis):
    segments = align(reference, hypothesis)
    expected = [w for s in segments if s.kind != "inserted" for w in s.text.split()]
    heard = [w for s in segments if s.kind != "deleted" for w in s.text.split()]
    assert (expected, heard) == (reference.split(), hypothesis.split())
    # A substitution is a deletion beside an insertion: count runs of wrong words by their longer side.
    edits = deleted = inserted = 0
    for segment in (*segments, None):
        if segment is None or segment.kind == "equal":
            edits += max(deleted, inserted)
            deleted = inserted = 0
        elif segment.kind == "deleted":
            deleted += len(segment.text.split())
        else:
            inserted += len(segment.text.split())
    assert edits == _edit_distance(reference.split(), hypothesis.split())


def _edit_distance(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return len(left) + len(right)
    return min(
        _edit_distance(left[1:], right) + 1,
        _edit_distance(left, right[1:]) + 1,
        _edit_distance(left[1:], right[1:]) + (left[0] != right[0]),
    )
