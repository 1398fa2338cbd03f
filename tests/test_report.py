import base64
import dataclasses
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest

from report_records import HOSTILE, WAV, bare, full_results, outliers, row
from sparq.report import (
    FRAMEWORKS,
    PRECISIONS,
    CurvePoint,
    HiddenMap,
    LiveSlice,
    Perplexity,
    Results,
    Row,
    TrainingCurve,
    plots,
    render_html,
    render_terminal,
    write_html,
)
from sparq.report.numbers import show_number
from sparq.report.tables import WIDTH, draw, main_table, prose_table


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
        for metric in (found.textlm_ppl, found.speechlm_ppl, found.asr_wer, found.tts_uer, found.tts_cer):
            assert show_number(metric.value) in page.cells
        assert any(cell.startswith(show_number(found.prose_ppl.value)) for cell in page.cells)
        assert show_number(found.outliers.max_inf_norm) in page.cells
        split = found.asr["test-unseen-voice"]
        interval = f"[{show_number(split.low)}, {show_number(split.high)}]"
        assert f"{show_number(split.wer)} {interval} ({split.errors}/773)" in page.cells
        for rate in (found.tts_cer, found.tts_wer):
            assert f"{show_number(rate.value)} [{show_number(rate.low)}, {show_number(rate.high)}]" in page.cells
    assert "14.50 [11.25, 19.75]" in page.cells


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
    for word in (
        "Max inf norm by layer",
        "SpeechLM",
        "|value|",
        "|output|",
        "channel",
        "Validation accuracy",
        "u17u34",
        "$x_1$",
        "␣six",
        "□□",
    ):
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


def test_the_terminal_says_what_speech_is_compared_with(results: Results):
    text = " ".join(render_terminal(results).split())
    assert "TTS CER %" in text
    assert "the recognizer has 6.50 [4.25, 9.75] % CER and 14.50 [11.25, 19.75] % WER in the recordings." in text
    assert "TTS CER: over 3,210 reference characters of 24 utterances (test)." in text


def test_without_a_vocoder_the_column_is_that_of_units(results: Results, folder: Path):
    deaf = tuple(dataclasses.replace(r, tts_cer=None, tts_wer=None) for r in results.rows)
    bare = dataclasses.replace(results, rows=deaf, speech_references=())
    assert "TTS UER %" in render_terminal(bare)
    assert "CER %" not in render_terminal(bare)
    assert "What the recognizer hears" not in render_html(bare, folder=folder)


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


@pytest.mark.parametrize("logged", [True, False])
def test_accuracy_is_drawn_against_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: bool):
    """Figure 1 of the case study before SpARQ; a log without epochs has updates there."""
    points = tuple(
        CurvePoint(
            update=u, tokens=u, seconds=1.0, loss=1.0, lr=0.1, epochs=u / 8 if logged else None,
            valid_accuracy=u / 40 if u % 4 == 0 else None,
        )
        for u in range(1, 17)
    )  # fmt: skip
    curves = {name: TrainingCurve(points=points) for name in ("vanilla", "softmax1")}
    figures = []
    monkeypatch.setattr(plots, "inline_svg", lambda figure, _: figures.append(figure))
    plots.learning_curves(full_results(tmp_path, curves=curves))
    loss, _, accuracy = figures[0].axes
    assert (loss.get_xlabel(), accuracy.get_xlabel()) == ("updates", "epochs" if logged else "updates")
    assert [line.get_label() for line in accuracy.lines] == ["vanilla", "softmax1"]
    for line in accuracy.lines:
        assert list(line.get_xdata()) == ([0.5, 1.0, 1.5, 2.0] if logged else [4, 8, 12, 16])
        assert list(line.get_ydata()) == [10, 20, 30, 40]


def test_norms_are_drawn_where_they_were_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points = tuple(
        CurvePoint(update=u, tokens=u, seconds=1.0, loss=1.0, lr=0.1, valid_max_norm=norm)
        for u, norm in ((1, 24_600.0), (2, None), (3, 1_711.0))
    )
    figures = []
    monkeypatch.setattr(plots, "inline_svg", lambda figure, _: figures.append(figure))
    plots.learning_curves(full_results(tmp_path, curves={"softmax1": TrainingCurve(points=points)}))
    norms = figures[0].axes[3]
    assert norms.get_yscale() == "log"
    assert list(norms.lines[0].get_xdata()) == [1, 3]
    assert list(norms.lines[0].get_ydata()) == [24_600.0, 1_711.0]


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
    text = "\n".join(draw(table) for table in (main_table(bare(rows)), prose_table(bare(rows))))
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_repeated_training_is_compared_by_its_means_where_batches_were_others() -> None:
    def points(*losses: float) -> tuple[CurvePoint, ...]:
        return tuple(
            CurvePoint(update=number, tokens=10 * number, seconds=1.0, loss=loss, lr=1e-3)
            for number, loss in enumerate(losses, start=1)
        )

    same = LiveSlice(points=points(3.0, 2.0), max_abs_difference=0.5)
    other = LiveSlice(points=points(3.0, 2.0))
    curve = TrainingCurve(points=points(3.5, 2.5, 9.0), live=same)
    assert curve.comparison() == "losses differ from the stored ones by 0.50 at most"
    said = dataclasses.replace(curve, live=other).comparison()
    assert said.startswith("batches are not the stored ones")
    assert said.endswith("mean loss 2.50, stored 3.00")
