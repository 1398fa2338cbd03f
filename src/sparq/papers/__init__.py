"""The two papers: their numbers as data, their theory in numbers, their experiments as data that runs."""

from sparq.papers.experiments import EXPERIMENTS, Cell, Experiment, find_experiment
from sparq.papers.published import Published, load_published, recompute, recompute_claim
from sparq.papers.records import Record, add_records, read_records, summarize_seeds

__all__ = [
    "EXPERIMENTS",
    "Cell",
    "Experiment",
    "Published",
    "Record",
    "add_records",
    "find_experiment",
    "load_published",
    "read_records",
    "recompute",
    "recompute_claim",
    "summarize_seeds",
]
