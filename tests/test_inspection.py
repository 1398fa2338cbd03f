"""`sparq outliers` on the real backbone, and on a SpeechLM that has been trained a little."""

from pathlib import Path

import pytest

from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import measure_outliers
from sparq.models import load_model
from sparq.recipes.inspection import inspect_outliers

DEMO_MODEL = Path(__file__).resolve().parent.parent / "src" / "sparq" / "demo" / "adapters" / "softmax1"
TEXT = "The quick brown fox jumps over the lazy dog.\n\nAnd it comes back.\n"


@pytest.mark.pretrained
def test_variants_of_one_model(smollm2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "page.html"
    command = ["outliers", str(smollm2_folder), "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    assert main([*command, "--attention", "vanilla", "softmax1+clipped"]) == 0
    printed = capsys.readouterr().out
    assert "Outliers of layer outputs\n" in printed
    assert "|v| sinks" in printed
    assert "softmax1+clipped" in printed
    assert "Four tasks" not in printed
    page = out.read_text()
    assert page.count("<svg") == 4
    assert "Four tasks" not in page
    results = inspect_outliers([str(smollm2_folder)], text=tmp_path / "text.txt")
    (row,) = results.rows
    model = load_model(str(smollm2_folder))
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(smollm2_folder)(" ".join(TEXT.split()), return_tensors="pt")
    expected = measure_outliers(model, [{k: batch[k] for k in ("input_ids", "attention_mask")}])
    assert row.outliers is not None
    assert row.outliers.max_inf_norm == expected.max_inf_norm
    assert results.attention_maps[0].labels[:3] == ("The", " quick", " brown")

    # Its own page is made anew; anything else is not overwritten.
    assert main([*command, "--tokens", "5"]) == 0
    out.write_text("mine")
    assert main(command) == 2
    assert "exists and is no page of this command" in capsys.readouterr().err


@pytest.mark.pretrained
def test_a_speechlm_hears_and_reads(smollm2_folder: Path, whisper_folder: Path, human_data: Path) -> None:
    assert smollm2_folder.parent == whisper_folder.parent
    recording = sorted((human_data / "an4" / "audio").iterdir())[0]
    results = inspect_outliers([str(DEMO_MODEL)], audio=[recording])
    (row,) = results.rows
    assert row.framework == "softmax1"
    assert row.outliers is not None
    assert row.outliers.attention_mass < 1
    assert results.attention_maps[0].labels[0] == "<generatespeech>"
    assert [note.split(":")[0] for note in results.notes] == [
        f"softmax1, {of}" for of in ("speech", "boundary", "SpeechLM")
    ]
    assert ": 2 tokens, max inf norm" in results.notes[1]
    assert row.outliers.by_task == {}  # of one task there is nothing apart


@pytest.mark.pretrained
def test_tasks_are_measured_apart(smollm2_folder: Path, whisper_folder: Path, human_data: Path, tmp_path: Path) -> None:
    assert smollm2_folder.parent == whisper_folder.parent
    recordings = sorted((human_data / "an4" / "audio").iterdir())[:2]
    said, text = tmp_path / "said.txt", tmp_path / "text.txt"
    said.write_text("TURN ON THE LIGHT\n\nWhat time is it?\n")
    text.write_text(TEXT)
    results = inspect_outliers([str(DEMO_MODEL)], audio=recordings, transcripts=said, text=text)
    (row,) = results.rows
    assert row.outliers is not None
    tasks = row.outliers.by_task
    assert list(tasks) == ["TextLM", "SpeechLM", "ASR"]
    assert sum(task.tokens for task in tasks.values()) == row.outliers.tokens
    assert max(task.max_inf_norm for task in tasks.values()) == row.outliers.max_inf_norm
    # ASR has the units and the text of the others, its own prompt, and an end token less.
    assert tasks["ASR"].tokens > tasks["SpeechLM"].tokens
    (picture,) = results.attention_maps
    assert picture.labels[0] == "<startofspeech>"
    assert len(picture.values) == len(picture.outputs) == len(picture.labels) <= 40
    said.write_text("one line\n")
    with pytest.raises(SparqError, match=r"said.txt has 1 lines and there are 2 recordings: give one line for each"):
        inspect_outliers([str(DEMO_MODEL)], audio=recordings, transcripts=said)
    with pytest.raises(SparqError, match="the text gives no sequence within 1 tokens: outliers need 2 or more"):
        inspect_outliers([str(DEMO_MODEL)], tokens=1)


@pytest.mark.pretrained
def test_one_attention_of_two_runs(smollm2_folder: Path, tmp_path: Path) -> None:
    assert (smollm2_folder / "config.json").exists()
    (tmp_path / "text.txt").write_text(TEXT)
    other = tmp_path / "models" / "softmax1"
    other.parent.mkdir()
    other.symlink_to(DEMO_MODEL)
    results = inspect_outliers([str(DEMO_MODEL), str(other)], text=tmp_path / "text.txt")
    assert [row.framework for row in results.rows] == ["adapters/softmax1", "models/softmax1"]
    first, second = (row.outliers for row in results.rows)
    assert first == second


@pytest.mark.pretrained
def test_mistakes(smollm2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = tmp_path / "a.wav"
    recording.write_bytes(b"RIFF")
    for wrong, message in (
        ([str(smollm2_folder), "--audio", str(recording)], "is no trained SpeechLM: only those hear --audio"),
        ([str(DEMO_MODEL), "--attention", "vanilla"], "is a trained SpeechLM, which has one attention"),
        ([str(smollm2_folder), "--text", str(tmp_path / "none.txt")], "no such file"),
        ([str(smollm2_folder), "--tokens", "1"], "the text has 1 tokens: give 2 or more"),
        ([str(DEMO_MODEL), f"{DEMO_MODEL}/"], "a model is named twice in "),
        ([str(smollm2_folder), "--attention", "l1", "l1"], "an attention is named twice in l1 l1: name each once"),
    ):
        assert main(["outliers", *wrong, "--out", str(tmp_path / "o.html")]) == 2
        assert message in capsys.readouterr().err
