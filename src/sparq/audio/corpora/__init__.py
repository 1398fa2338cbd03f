"""Readers of corpora as they are published, one a file: a folder to a stream of rows."""

from sparq.audio.corpora.formats import FORMATS, corpus_lists, read_corpus

__all__ = ["FORMATS", "corpus_lists", "read_corpus"]
