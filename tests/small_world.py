"""A corpus, a backbone and a recipe small enough to run the whole job in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

WORDS = ("red", "green", "lamp", "door", "open", "close")
RATE = 16_000


def speak(text: str, pitch: float, random: np.random.Generator) -> np.ndarray:
    """Each word is a chord of its own, 0.15 s long; noise keeps silence from being digital."""
    parts = []
    for word in text.split():
        time = np.arange(int(0.15 * RATE)) / RATE
        tones = [300 + 210 * WORDS.index(word), 1000 + 330 * (WORDS.index(word) % 3)]
        parts.append(sum(np.sin(2 * np.pi * pitch * f * time) for f in tones) * 0.2)
        parts.append(np.zeros(int(0.03 * RATE)))
    samples = np.concatenate(parts)
    return (samples + 1e-3 * random.standard_normal(len(samples))).astype(np.float32)


def make_corpus(folder: Path, *, utterances: int = 30) -> Path:
    """Write WAV files of three speakers and a manifest with splits; return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = ["id\tpath\tspeaker\tsplit\tseconds\ttext\n"]
    for index in range(utterances):
        text = " ".join(random.choice(WORDS, size=int(random.integers(1, 4))))
        speaker = index % 3
        split = "test" if index % 10 == 8 else "valid" if index % 10 == 9 else "train"
        samples = speak(text, (1.0, 1.1, 0.9)[speaker], random)
        soundfile.write(folder / f"{index}.wav", samples, RATE)
        rows.append(f"u{index}\t{index}.wav\ts{speaker}\t{split}\t{len(samples) / RATE:.3f}\t{text}\n")
    manifest = folder / "manifest.tsv"
    manifest.write_text("".join(rows))
    return manifest


def make_backbone(folder: Path, family: str = "llama") -> Path:
    """Write a random causal LM with a byte-level tokenizer, as a Hugging Face folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [" " + " ".join(WORDS)] * 4 + ["The quick brown fox jumps over the lazy dog."]
    trainer = BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
            )
        )  # fmt: skip
    else:
        post_norm = family == "opt-post-norm"
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=size, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=512, word_embed_proj_dim=16 if post_norm else 32,
                do_layer_norm_before=not post_norm, pad_token_id=1, bos_token_id=2, eos_token_id=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder


TINY = {
    "prepare.max_seconds": 20,
    "units": {"features": "mfcc", "k": 8, "n_init": 1, "shard_utterances": 5},
    "vocab": {"size": 60, "model_type": "bpe", "text_repeat": 4},
    "train.updates": 4,
    "train.warmup_updates": 1,
    "train.rank": 2,
    "train.batch_tokens": 400,
    "train.accumulate": 1,
    "train.checkpoint_updates": 1,
    "train.validate_updates": 2,
    "quantize.calibration_sequences": 4,
    "evaluate.max_utterances": 2,
    "evaluate.tts_utterances": 1,
    "evaluate.batch_size": 4,
    "evaluate.max_new_text": 4,
    "evaluate.vocoder": None,
}
"""Settings that make any recipe small."""


def tiny_overrides(manifest: Path, backbone: Path, **changes: Any) -> list[str]:
    """Return `--set` values that put a recipe onto this small world."""
    values = {
        "prepare.sources": [{"manifest": str(manifest), "corpus": "small"}],
        "model.backbone": str(backbone),
        "train.corpus_weights": {},
        **TINY,
        **changes,
    }
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"
        for key, value in values.items()
    ]


def write_recipe(path: Path, manifest: Path, backbone: Path, **changes: Any) -> Path:
    """Write a whole recipe for this small world."""
    recipe: dict[str, Any] = {"name": "small", "prepare": {}, "model": {}, "train": {}, "evaluate": {}, "quantize": {}}
    values = {
        "prepare.sources": [{"manifest": str(manifest), "corpus": "small"}],
        "model.backbone": str(backbone),
        **TINY,
        **changes,
    }
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = dict(value) if isinstance(value, dict) else value  # TINY is everyone's
    path.write_text(yaml.safe_dump(recipe))
    return path
