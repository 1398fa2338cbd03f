"""The two papers: their numbers as data, their theory in numbers, their experiments as data that runs."""

from sparq.papers.published import Published, load_published, recompute, recompute_claim

__all__ = ["Published", "load_published", "recompute", "recompute_claim"]
