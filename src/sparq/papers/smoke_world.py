"""A corpus, a backbone and a recipe so small that every experiment takes seconds: a check, not a result."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from sparq.files import atomic_path, write_text
from sparq.pretrained.quiet import quiet_transformers
from sparq.recipes.recipe import (
    EvaluateConfig,
    ModelConfig,
    PrepareConfig,
    QuantizeConfig,
    Recipe,
    SourceConfig,
    TrainConfig,
    UnitsConfig,
    VocabConfig,
)
from sparq.types import SAMPLE_RATE

_WORDS = ("red", "green", "lamp", "door", "open", "close")
_UTTERANCES = 20
_SEED = 0


def smoke_recipe(folder: Path) -> Recipe:
    """Make the corpus and a random tiny OPT in a folder, unless they are there, and return the recipe.

    Words are chords of tones, so that units have something to find; the model is as transformers initializes it.
    """
    for name, make in (("corpus", _make_corpus), ("opt", _make_backbone)):
        if not (folder / name).exists():
            with atomic_path(folder / name) as temporary:
                temporary.mkdir(parents=True)
                make(temporary)
    source = SourceConfig(manifest=(folder / "corpus" / "manifest.tsv").absolute(), corpus="tones")
    return Recipe(
        name="smoke",
        prepare=PrepareConfig(sources=(source,)),
        units=UnitsConfig(features="mfcc", k=8, n_init=1, shard_utterances=20),
        vocab=VocabConfig(size=60, model_type="bpe", text_repeat=4),
        model=ModelConfig(backbone=str((folder / "opt").absolute())),
        train=TrainConfig(
            updates=4, rank=2, alpha=2, warmup_updates=1, batch_tokens=400, accumulate=1, checkpoint_updates=4,
            validate_updates=2, dtype="float32",
        ),
        quantize=QuantizeConfig(calibration_sequences=4),
        evaluate=EvaluateConfig(max_utterances=2, tts_utterances=1, batch_size=4, max_new_text=4),
    )  # fmt: skip


def _make_corpus(folder: Path) -> None:
    random = np.random.default_rng(_SEED)
    rows = ["id\tpath\tspeaker\tsplit\tseconds\ttext\n"]
    for index in range(_UTTERANCES):
        words = random.choice(_WORDS, size=int(random.integers(1, 4)))
        samples = np.concatenate([_chord(_WORDS.index(word)) for word in words])
        samples += 1e-3 * random.standard_normal(len(samples))  # silence is not digital
        soundfile.write(folder / f"{index}.wav", samples.astype(np.float32), SAMPLE_RATE)
        split = "test" if index % 10 == 8 else "valid" if index % 10 == 9 else "train"
        seconds = len(samples) / SAMPLE_RATE
        rows.append(f"u{index}\t{index}.wav\ts{index % 3}\t{split}\t{seconds:.3f}\t{' '.join(words)}\n")
    write_text(folder / "manifest.tsv", "".join(rows))


def _chord(word: int) -> np.ndarray:
    """Return 0.15 s of the two tones of a word and 0.03 s of silence."""
    time = np.arange(int(0.15 * SAMPLE_RATE)) / SAMPLE_RATE
    tones = (300 + 210 * word, 1000 + 330 * (word % 3))
    chord: np.ndarray = sum((0.2 * np.sin(2 * np.pi * tone * time) for tone in tones), np.zeros(len(time)))
    return np.concatenate([chord, np.zeros(int(0.03 * SAMPLE_RATE))])


def _make_backbone(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([" " + " ".join(_WORDS)] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(_SEED)
        OPTForCausalLM(
            OPTConfig(
                vocab_size=tokenizer.get_vocab_size(), hidden_size=32, ffn_dim=64, word_embed_proj_dim=32,
                num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, pad_token_id=1,
                bos_token_id=2, eos_token_id=2,
            )
        ).save_pretrained(folder)  # fmt: skip
