"""The step that makes the low-bit models of one framework."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparq.adaptation import load_speechlm
from sparq.data import collate
from sparq.data.batching import epoch_examples
from sparq.progress import progress
from sparq.quantization import QuantizationScheme, quantize, save_quantized
from sparq.quantization.names import settings_of_name
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.train_step import Spoken, load_split
from sparq.tokens import JointVocabulary
from sparq.tokens.special import PAD
from sparq.types import TASKS

_CALIBRATION_BATCH = 16


def scheme_of_name(name: str, smoothing_alpha: float) -> QuantizationScheme:
    """Return the scheme that a precision label such as `w4a4-smoothquant` stands for."""
    return QuantizationScheme.from_dict({**settings_of_name(name), "smoothing_alpha": smoothing_alpha})


def calibration_batches(
    utterances: list[Spoken], vocabulary: JointVocabulary, *, count: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield `count` training sequences, as many of each task, with a mask that leaves padding out."""
    examples = []
    for index, task in enumerate(TASKS):
        weights = {other: float(other == task) for other in TASKS}
        usable = [u for u in utterances if u.text or task == "speechlm"]
        share = count // len(TASKS) + (index < count % len(TASKS))
        generator = torch.Generator().manual_seed(seed * len(TASKS) + index)
        chosen = [usable[i] for i in torch.randperm(len(usable), generator=generator)[:share].tolist()]
        examples += epoch_examples(chosen, vocabulary, weights=weights, seed=seed, epoch=0)
    examples.sort(key=len)
    for start in range(0, len(examples), _CALIBRATION_BATCH):
        group = examples[start : start + _CALIBRATION_BATCH]
        ids = collate(group, pad_id=vocabulary.token_id(PAD)).input_ids
        lengths = torch.tensor([len(example) for example in group])
        yield {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def run_quantize(recipe: Recipe, run: RunFolder, framework: str) -> list[Path]:
    """Quantize the adapted model of a framework by every scheme, its adapters merged into a fresh float32 base."""
    set_threads(recipe)
    speechlm = load_speechlm(run.model(framework))
    utterances = load_split(run, "train", speechlm.vocabulary)
    settings = recipe.quantize
    folders = [run.quantized(framework, name) for name in settings.schemes]
    with progress(f"quantize {framework}", total=len(folders), unit="scheme") as bar:
        for name, folder in zip(settings.schemes, folders, strict=True):
            if not folder.exists():
                calibration = calibration_batches(
                    utterances, speechlm.vocabulary, count=settings.calibration_sequences, seed=recipe.seed
                )
                scheme = scheme_of_name(name, settings.smoothing_alpha)
                save_quantized(quantize(speechlm.model, calibration, scheme), folder)
            bar.update()
    return folders
