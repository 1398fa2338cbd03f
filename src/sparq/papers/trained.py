"""One model of an experiment: what it is trained on, and once it is trained, its rows at each precision."""

import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel

from sparq.adaptation import SpeechLM, load_speechlm
from sparq.devices import compute_device
from sparq.files import atomic_path, fingerprint, read_json, write_json
from sparq.papers.experiments import FULL, Cell
from sparq.papers.profiles import Profile
from sparq.quantization import quantize
from sparq.recipes.calibration import padded_batches, task_examples
from sparq.recipes.evaluate_step import load_listener, measure, test_splits
from sparq.recipes.listening import Listener
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.steps import run_steps
from sparq.recipes.train_step import Spoken, load_split, load_vocabulary
from sparq.report import Row
from sparq.report.codec import row_from_json, to_json
from sparq.tokens import JointVocabulary


class PreparedCell:
    """A model that is not trained yet, with the speech and the vocabulary that it will be, in its run folder.

    All models of an adaptation share a run folder. The speech is prepared, encoded and given a vocabulary once for all
    seeds, in a run folder of its own that the others are copies of.

    Attributes:
        cell: which model; its precision is that of the rows only.
        profile: where it comes from.
        seed: of what is drawn at random in training and calibration.
        recipe: the recipe that it is trained by.
        run: its run folder.
    """

    def __init__(self, cell: Cell, profile: Profile, seed: int, out: Path) -> None:
        """Prepare what is not there.

        Raises:
            SparqError: a step fails.
        """
        self.cell, self.profile, self.seed = cell, profile, seed
        self.recipe: Recipe = profile.recipe_of(cell, seed)
        self._steps = profile.steps_of(cell)
        self.run = RunFolder(out / f"{profile.name}-seed{seed}" / f"{cell.adaptation}{cell.rank or ''}")
        if not self.run.path.exists():
            speech = RunFolder(out / f"{profile.name}-speech")
            run_steps(self.recipe, speech, self._steps, until="vocab")
            with atomic_path(self.run.path) as temporary:
                shutil.copytree(speech.path, temporary)

    @cached_property
    def vocabulary(self) -> JointVocabulary:
        """The joint vocabulary."""
        return load_vocabulary(self.run)

    @cached_property
    def splits(self) -> dict[str, list[Spoken]]:
        """The test splits, as far as they are measured."""
        count = self.recipe.evaluate.max_utterances
        splits = {name: load_split(self.run, name, self.vocabulary) for name in test_splits(self.run)}
        return {name: utterances[: count or None] for name, utterances in splits.items()}

    def quantized(self, model: PreTrainedModel, precision: str, *, resume: Path | None = None) -> PreTrainedModel:
        """Return a model of this cell quantized, calibrated as the step `quantize` does it."""
        count = self.profile.calibration_sequences(precision)
        utterances = load_split(self.run, "train", self.vocabulary)
        examples = task_examples(utterances, self.vocabulary, count=count, seed=self.seed)
        batches = padded_batches(examples, self.vocabulary)
        return quantize(model, batches, self.profile.scheme_of(precision), resume=resume)


class TrainedCell(PreparedCell):
    """A model that the recipe's steps have trained, and its rows."""

    def __init__(self, cell: Cell, profile: Profile, seed: int, out: Path) -> None:
        """Train the model, or take what is there.

        Raises:
            SparqError: a step fails; if the loss is not finite, the message says so.
        """
        super().__init__(cell, profile, seed, out)
        run_steps(self.recipe, self.run, self._steps, until="train")

    @cached_property
    def speechlm(self) -> SpeechLM:
        """The model in full precision."""
        speechlm = load_speechlm(self.run.model(self.cell.framework))
        speechlm.model.to(compute_device())
        return speechlm

    @cached_property
    def _listener(self) -> Listener | None:
        return load_listener(self.recipe, self.run, self.speechlm)

    def forget_model(self) -> None:
        """Free the memory of the model; it is loaded anew where it is asked for."""
        self.__dict__.pop("speechlm", None)

    def model(self, precision: str) -> PreTrainedModel:
        """Return the model at a precision.

        What takes minutes is kept beside the model: an interrupted call goes on from it, and so does another measure.
        """
        if precision == FULL:
            return self.speechlm.model
        scheme, count = self.profile.scheme_of(precision), self.profile.calibration_sequences(precision)
        kept = self.run.path / "quantizing" / f"{self.cell.framework}-{precision}-{fingerprint(scheme.chosen(), count)}"
        return self.quantized(self.speechlm.model, precision, resume=kept if scheme.resumes else None)

    def row(self, precision: str) -> Row:
        """Return the four tasks and the outliers at a precision; what was measured is kept beside the model."""
        key = self.profile.settings_of(replace(self.cell, precision=precision), self.seed)
        file = self.run.path / "rows" / f"{self.cell.framework}-{precision}-{key}.json"
        if not file.exists():
            row, _ = measure(
                self.model(precision), self.vocabulary, self.splits, self.recipe,
                framework=self.cell.framework, precision=precision, listener=self._listener,
                samples=file.with_suffix(""),
            )  # fmt: skip
            write_json(file, to_json(row))
        return row_from_json(read_json(file), str(file))
