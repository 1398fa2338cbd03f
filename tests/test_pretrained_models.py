"""Conversion of pretrained weights, and the real models at work. No downloads."""

import hashlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import sinusoids as transformers_sinusoids

from sparq.audio.manifest import read_manifest
from sparq.audio.waveform import read_waveform
from sparq.pretrained import pretrained_folder, weights_note
from sparq.pretrained.cache import MODELS
from sparq.pretrained.whisper import read_ctranslate2, sinusoids
from sparq.vocoder.recognizer import Recognizer


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """On busy cores the threads of a small model mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- conversion


def test_read_ctranslate2() -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    halves = np.arange(6, dtype=np.float16).reshape(2, 3)
    variables = [("a/weight", halves, 4), ("heads", np.array(6, np.int16), 2)]
    content = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array, code in variables:
        content += string(name) + struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    found = read_ctranslate2(content + struct.pack("<I", 0))
    assert list(found) == ["a/weight", "heads"]
    np.testing.assert_array_equal(found["a/weight"], halves)
    assert found["a/weight"].dtype == np.float16
    assert found["heads"] == 6


def test_sinusoids_are_those_of_transformers() -> None:
    # Theirs are computed in float32, otherwise on other processors: a rate's last bit grows with the position.
    positions = torch.arange(1500)[:, None]
    difference = (sinusoids(1500, 384) - transformers_sinusoids(1500, 384)).abs()
    assert (difference <= 1e-7 + positions * 2.0**-23).all()


def test_sinusoids_follow_their_definition_a_number_at_a_time() -> None:
    found, single = sinusoids(1500, 384).numpy(), np.float32
    for channel in (0, 1, 7, 64, 100, 191):
        rate = single(math.exp(-math.log(10_000) * channel / 191))
        for position in range(0, 1500, 37):
            angle = float(single(position) * rate)
            assert found[position, channel] == pytest.approx(math.sin(angle), abs=1e-7)
            assert found[position, 192 + channel] == pytest.approx(math.cos(angle), abs=1e-7)


def test_sinusoids_have_the_same_bits_on_every_processor() -> None:
    digest = hashlib.sha256(sinusoids(1500, 384).numpy().tobytes()).hexdigest()
    assert digest == "c306a98c27c89201c17874cfa054ea23070473327b9856b65b447a4d02ba18e3"


# --- the real ones


@pytest.mark.pretrained
def test_cached_files_are_whole(smollm2_folder: Path, whisper_folder: Path) -> None:
    assert pretrained_folder("smollm2-135m", smollm2_folder.parent) == smollm2_folder
    assert pretrained_folder("whisper-tiny.en", whisper_folder.parent, verify=True) == whisper_folder
    note = weights_note(smollm2_folder)
    assert note is not None
    assert "Q4_1" in note
    assert "Q8_0" in note
    assert set(MODELS) == {"smollm2-135m", "whisper-tiny.en", "whisper-base", "voice-encoder"}
    assert pretrained_folder("voice-encoder", smollm2_folder.parent, verify=True).name == "voice-encoder"


@pytest.mark.pretrained
@pytest.mark.usefixtures("_one_thread")
def test_smollm2_knows_english(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    language_model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    assert {p.dtype for p in language_model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in language_model.parameters()) == 134_515_008
    text = "The capital of France is Paris. It is the largest city in the country, and lies on the river"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = language_model(ids, labels=ids)
    assert math.exp(output.loss) < 15
    assert tokenizer.decode(output.logits[0, -1].argmax()).strip() == "Se"


@pytest.mark.pretrained
@pytest.mark.usefixtures("_one_thread")
def test_whisper_recognizes_a_person(whisper_folder: Path, human_data: Path) -> None:
    row = next(r for r in read_manifest(human_data / "ljspeech" / "transcripts.tsv") if r.id == "LJ001-0002")
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_folder)
    features = extractor(read_waveform(row.path), sampling_rate=16_000, return_tensors="pt").input_features
    whisper = WhisperModel.from_pretrained(whisper_folder).eval()
    ids = [50257, 50362]  # start of transcript, no time stamps
    with torch.inference_mode():
        encoded = whisper.encoder(features)
        while ids[-1] != 50256 and len(ids) < 20:
            hidden = whisper.decoder(torch.tensor([ids]), encoder_hidden_states=encoded.last_hidden_state)
            logits = hidden.last_hidden_state[0, -1] @ whisper.decoder.embed_tokens.weight.T
            ids.append(int(logits.argmax()))
    tokenizer = AutoTokenizer.from_pretrained(whisper_folder)
    assert tokenizer.decode(ids[2:-1]).strip().lower().rstrip(".") == row.text


@pytest.mark.pretrained
@pytest.mark.parametrize("name", ["whisper-tiny.en", "whisper-base"])
@pytest.mark.usefixtures("_one_thread")
def test_both_recognizers_understand_a_person(name: str, whisper_folder: Path, human_data: Path) -> None:
    rows = [
        r for r in read_manifest(human_data / "ljspeech" / "transcripts.tsv") if r.id in ("LJ001-0002", "LJ001-0012")
    ]
    recognizer = Recognizer(str(whisper_folder.parent / name))
    heard = recognizer.transcribe([read_waveform(row.path) for row in rows])
    assert heard == [recognizer.normalize(row.text) for row in rows]
