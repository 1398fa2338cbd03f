"""The two papers: their numbers as data, their theory in numbers, their experiments as data that runs."""

from sparq.papers.experiments import EXPERIMENTS, Cell, Experiment, find_experiment, restricted
from sparq.papers.expressiveness import Adapted, adapt, functionality_gaps, needed_rank
from sparq.papers.norm_condition import LayerNorms, measure_norm_condition, query_updates
from sparq.papers.published import Published, load_published, recompute, recompute_claim
from sparq.papers.records import Record, add_records, read_records, summarize_seeds
from sparq.papers.softmax1_transformer import TheoremBlock, TheoremTransformer

__all__ = [
    "EXPERIMENTS",
    "Adapted",
    "Cell",
    "Experiment",
    "LayerNorms",
    "Published",
    "Record",
    "TheoremBlock",
    "TheoremTransformer",
    "adapt",
    "add_records",
    "find_experiment",
    "functionality_gaps",
    "load_published",
    "measure_norm_condition",
    "needed_rank",
    "query_updates",
    "read_records",
    "recompute",
    "recompute_claim",
    "restricted",
    "summarize_seeds",
]
