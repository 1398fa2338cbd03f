"""Zero-resource scores: benchmarks as they are published, made small, against hand-made and slow references."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import small_world
from sparq.adaptation import load_speechlm
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.evaluation import MinimalPair, pair_accuracies, read_pairs, read_sblimp, read_swuggy
from sparq.recipes import scoring
from sparq.recipes.apply import encode_recordings
from sparq.recipes.prose import load_tokenizer
from sparq.recipes.scoring import score_pairs, text_perplexity
from sparq.tokens import make_example

# The columns and spelling of lexical/dev/gold.csv and syntactic/dev/gold.csv of ZeroSpeech 2021.
LEXICAL = """id,filename,voice,frequency,word,phones,length,correct
1,aAbB,A,0,chariot,CH EH R IY AH T,6,1
1,bBcC,A,0,shariot,SH EH R IY AH T,6,0
1,cCdD,B,0,chariot,CH EH R IY AH T,6,1
1,dDeE,B,0,shariot,SH EH R IY AH T,6,0
2,eEfF,A,20,door,D AO R,3,1
2,fFgG,A,20,dorr,D AA R,3,0
3,gGhH,A,101,"open, wide",OW P AH N,4,1
3,hHiI,A,101,opem,OW P AH M,4,0
4,iIjJ,A,,lamp,L AE M P,4,1
4,jJkK,A,,lanp,L AE N P,4,0
"""
SYNTACTIC = """id,filename,voice,type,subtype,transcription,correct
1,aAbB,A,agreement,anaphor_gender,the door opens,1
1,bBcC,A,agreement,anaphor_gender,the door open,0
1,cCdD,A,agreement,anaphor_number,the lamps are red,1
1,dDeE,A,agreement,anaphor_number,the lamps is red,0
1,eEfF,A,filler_gap,wh_questions,who opens it,1
1,fFgG,A,filler_gap,wh_questions,who opens it it,0
"""


def _benchmark(folder: Path, gold: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "gold.csv").write_text(gold)
    random = np.random.default_rng(1)
    for index, line in enumerate(gold.splitlines()[1:]):
        words = [small_world.WORDS[index % 6], small_world.WORDS[index // 2 % 6]]
        samples = small_world.speak(" ".join(words), 1.0 + index / 50, random)
        small_world.soundfile.write(folder / f"{line.split(',')[1]}.wav", samples, 16_000)
    return folder


def test_swuggy_is_read_as_it_is_published(tmp_path: Path) -> None:
    pairs = read_swuggy(_benchmark(tmp_path / "lexical" / "dev", LEXICAL))
    assert [(p.item, p.correct.stem, p.incorrect.stem) for p in pairs] == [
        ("1", "aAbB", "bBcC"), ("1", "cCdD", "dDeE"), ("2", "eEfF", "fFgG"), ("3", "gGhH", "hHiI"),
        ("4", "iIjJ", "jJkK"),
    ]  # fmt: skip
    assert [p.groups for p in pairs] == [
        ("frequency oov",), ("frequency oov",), ("in vocabulary", "frequency 6-20"),
        ("in vocabulary", "frequency >100"), (),
    ]  # fmt: skip


def test_sblimp_is_read_as_it_is_published(tmp_path: Path) -> None:
    pairs = read_sblimp(_benchmark(tmp_path / "syntactic" / "dev", SYNTACTIC))
    # Ids count anew in each subtype.
    assert [p.item for p in pairs] == [
        "agreement/anaphor_gender/1", "agreement/anaphor_number/1", "filler_gap/wh_questions/1",
    ]  # fmt: skip
    assert [p.groups for p in pairs] == [("type agreement",)] * 2 + [("type filler_gap",)]


def test_voices_of_one_item_count_together_and_ties_half() -> None:
    def pair(item: str, index: int, *groups: str) -> MinimalPair:
        return MinimalPair(item=item, groups=groups, correct=Path(f"r{index}"), incorrect=Path(f"w{index}"))

    pairs = [pair("a", 0, "g"), pair("a", 1, "g"), pair("a", 2), pair("b", 3)]
    scores = {Path("r0"): -1.0, Path("w0"): -2.0, Path("r1"): -3.0, Path("w1"): -2.0}
    scores |= {Path("r2"): -1.0, Path("w2"): -1.0, Path("r3"): 0.0, Path("w3"): -1.0}
    found = pair_accuracies(pairs, scores)
    # Item a: right, wrong, tie; item b: right.
    assert found["all"].percent == pytest.approx(100 * ((1 + 0 + 0.5) / 3 + 1) / 2)
    assert (found["all"].items, found["all"].pairs) == (2, 4)
    assert (found["g"].percent, found["g"].items, found["g"].pairs) == (50, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("filename", "file"), r"gold.csv lacks the column 'filename'"),
        (lambda text: text.replace("SH EH R IY AH T,6,0", "SH EH R IY AH T,6,1", 1), "'bBcC' has correct '1': each id"),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", "4/A has one row"),
        (lambda text: text + "5,zZ,A\n", "line 12 has not as many fields"),
        (lambda text: text.splitlines()[0] + "\n", "has no rows"),
        (lambda text: text.replace("aAbB", "gone"), "no such file: .*gone.wav"),
    ],
)
def test_a_faulty_benchmark_is_a_line(tmp_path: Path, change: object, message: str) -> None:
    folder = _benchmark(tmp_path / "dev", LEXICAL)
    (folder / "gold.csv").write_text(change(LEXICAL))
    with pytest.raises(SparqError, match=message):
        read_swuggy(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run/`, trained."""
    folder = tmp_path_factory.mktemp("world")
    manifest = small_world.make_corpus(folder / "corpus")
    backbone = small_world.make_backbone(folder / "backbone")
    recipe = small_world.write_recipe(folder / "recipe.yaml", manifest, backbone, frameworks=["vanilla"])
    assert main(["run", str(recipe), "--until", "train", "--out", str(folder / "run")]) == 0
    return folder


def _slow_score(world: Path, file: Path, *, mean: bool) -> float:
    """One recording, one piece at a time, each from a fresh pass."""
    speechlm = load_speechlm(world / "run" / "models" / "vanilla")
    (units,) = encode_recordings(speechlm, [file])
    example = make_example(speechlm.vocabulary, "speechlm", text="", units=units)
    total = 0.0
    for index, token in enumerate(example.target):
        with torch.no_grad():
            logits = speechlm.model(torch.tensor([[*example.prompt, *example.target[:index]]])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), dim=-1)[token])
    return total / len(example.target) if mean else total


@pytest.mark.parametrize("mean", [True, False])
def test_scores_are_those_of_each_recording_alone(world: Path, tmp_path: Path, mean: bool) -> None:
    folder = _benchmark(tmp_path / "dev", SYNTACTIC)
    slow = {file: _slow_score(world, file, mean=mean) for file in folder.glob("*.wav")}
    found = score_pairs("sblimp", folder, model=world / "run" / "models" / "vanilla", mean=mean)
    assert found == pair_accuracies(read_sblimp(folder), slow)


def test_the_command_prints_every_group(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(world / "run" / "models" / "vanilla")]
    folder = _benchmark(tmp_path / "dev", LEXICAL)
    assert main(["score", "swuggy", str(folder), *model]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} == {
        "all", "in vocabulary", "frequency oov", "frequency 6-20", "frequency >100",
    }  # fmt: skip
    assert lines[0][2] == "4 items, 5 pairs" or lines[1][2] == "4 items, 5 pairs"
    table = tmp_path / "stories.tsv"
    table.write_text("id\tcorrect\tincorrect\ns1\tdev/aAbB.wav\tdev/bBcC.wav\n")
    assert [p.item for p in read_pairs(table)] == ["s1"]
    assert main(["score", "pairs", str(table), *model, "--sum"]) == 0
    assert capsys.readouterr().out.startswith("all\t")
    assert main(["score", "swugy", str(folder), *model]) == 2
    assert "did you mean 'swuggy'?" in capsys.readouterr().err


def test_text_is_scored_without_its_first_token(world: Path) -> None:
    backbone = world / "backbone"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(backbone), load_tokenizer(str(backbone))
    texts = ("open the red door", "", "the lamp")
    found = text_perplexity(texts, model, tokenizer)
    nll, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for index in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:index]])).logits[0, -1].double()
            nll -= float(torch.log_softmax(logits, dim=-1)[ids[index]])
            count += 1
    assert found.tokens == count
    assert found.left_out == 1
    assert found.value == pytest.approx(math.exp(nll / count), rel=1e-5)
    with pytest.raises(SparqError, match="none of 1 continuations has two words"):
        text_perplexity(("",), model, tokenizer)


def test_genppl_hears_the_continuations(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Deaf:
        def __init__(self, model: str) -> None: ...

        def transcribe(self, waveforms: list[np.ndarray]) -> list[str]:
            return ["open the door"] * len(waveforms)

    pieces = []

    def speech(vocoder: object, portions: object, voice: object, *, dedup: bool) -> list[np.ndarray]:
        pieces.append([unit for portion in portions for unit in portion])
        return [np.zeros(320, np.float32)] if pieces[-1] else []

    class Silent:
        def voice(self) -> None: ...

    monkeypatch.setattr(scoring, "Recognizer", Deaf)
    monkeypatch.setattr(scoring, "speech", speech)
    monkeypatch.setattr(scoring, "vocoder_for", lambda *_: Silent())
    shutil.copy(world / "corpus" / "0.wav", tmp_path / "a.wav")
    command = [
        "score",
        "genppl",
        str(tmp_path / "a.wav"),
        str(tmp_path / "a.wav"),
        "--text-lm",
        str(world / "backbone"),
    ]
    command += ["--model", str(world / "run" / "models" / "vanilla"), "--max-new", "12"]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in out] == [str(tmp_path / "a.wav")] * 2 + ["GenPPL"]
    first = list(pieces)
    pieces.clear()
    assert main(command) == 0
    assert pieces == first  # the draws are the seed's
    pieces.clear()
    assert main([*command, "--seed", "1"]) == 0
    assert pieces != first
    assert main([*command, "--prompt", "0"]) == 2
    assert "'0' is not a length in seconds" in capsys.readouterr().err
