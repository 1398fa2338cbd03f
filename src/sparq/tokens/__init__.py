"""The joint vocabulary of speech units and text, and the four sequence templates."""

from sparq.tokens.prompts import Example, make_example, prompt_ids
from sparq.tokens.vocabulary import JointVocabulary, fit_vocabulary

__all__ = ["Example", "JointVocabulary", "fit_vocabulary", "make_example", "prompt_ids"]
