"""The four sequence templates (VoxtLM; SpARQ section 3.1), each split where the loss begins."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparq.tokens.special import END, GENERATE_SPEECH, GENERATE_TEXT, START_OF_SPEECH, START_OF_TEXT
from sparq.tokens.vocabulary import JointVocabulary
from sparq.types import Task


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sequence: the loss counts on `target` only, which follows the generate token that ends `prompt`.

    `seconds` is how long the speech in it lasts, 0 for text alone.
    """

    task: Task
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def prompt_ids(
    vocabulary: JointVocabulary, task: Task, *, text: str = "", units: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the ids that precede what the model has to generate.

    textlm `<generatetext>`; speechlm `<generatespeech>`; asr `<startofspeech> units <generatetext>`;
    tts `<startoftext> text <generatespeech>`.
    """
    token = vocabulary.token_id
    if task == "textlm":
        return (token(GENERATE_TEXT),)
    if task == "speechlm":
        return (token(GENERATE_SPEECH),)
    if task == "asr":
        return (token(START_OF_SPEECH), *vocabulary.encode_units(units), token(GENERATE_TEXT))
    return (token(START_OF_TEXT), *vocabulary.encode_text(text), token(GENERATE_SPEECH))


def make_example(
    vocabulary: JointVocabulary,
    task: Task,
    *,
    text: str,
    units: Sequence[int],
    prompt_units: Sequence[int] | None = None,
) -> Example:
    """Return the whole sequence of one utterance for one task; the end token is last.

    Args:
        vocabulary: the joint vocabulary.
        task: which template.
        text: normalized transcript.
        units: speech units.
        prompt_units: units to show in the ASR prompt instead of `units` (augmented ones, say).
    """
    prompt = prompt_ids(vocabulary, task, text=text, units=units if prompt_units is None else prompt_units)
    target = vocabulary.encode_text(text) if task in ("textlm", "asr") else vocabulary.encode_units(units)
    return Example(task=task, prompt=prompt, target=(*target, vocabulary.token_id(END)))
