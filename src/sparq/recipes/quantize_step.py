"""The step that makes the low-bit models of one framework."""

from pathlib import Path

from sparq.adaptation import load_speechlm
from sparq.devices import compute_device
from sparq.files import remove
from sparq.progress import progress
from sparq.quantization import QuantizationScheme, quantize, save_quantized
from sparq.quantization.names import settings_of_name
from sparq.recipes.calibration import padded_batches, task_examples
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_steps import set_threads
from sparq.recipes.train_step import load_split


def scheme_of_name(name: str, smoothing_alpha: float) -> QuantizationScheme:
    """Return the scheme that a precision label such as `w4a4-smoothquant` stands for."""
    return QuantizationScheme.from_dict({**settings_of_name(name), "smoothing_alpha": smoothing_alpha})


def run_quantize(recipe: Recipe, run: RunFolder, framework: str) -> list[Path]:
    """Quantize the adapted model of a framework by every scheme, its adapters merged into a fresh float32 base.

    What takes minutes is kept in SCHEME.unfinished until it is done, so that an interrupted step goes on from it.
    """
    set_threads(recipe)
    speechlm = load_speechlm(run.model(framework))
    speechlm.model.to(compute_device())
    utterances = load_split(run, "train", speechlm.vocabulary)
    settings = recipe.quantize
    folders = [run.quantized(framework, name) for name in settings.schemes]
    with progress(f"quantize {framework}", total=len(folders), unit="scheme") as bar:
        for name, folder in zip(settings.schemes, folders, strict=True):
            if not folder.exists():
                examples = task_examples(
                    utterances, speechlm.vocabulary, count=settings.calibration_sequences, seed=recipe.seed
                )
                scheme = scheme_of_name(name, settings.smoothing_alpha)
                resume = _unfinished(folder) if scheme.resumes else None
                batches = padded_batches(examples, speechlm.vocabulary)
                save_quantized(quantize(speechlm.model, batches, scheme, resume=resume), folder)
            remove(_unfinished(folder))
            bar.update()
    return folders


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.unfinished")
