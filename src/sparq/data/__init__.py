"""From utterances to batches of the four tasks, padded or packed."""

from sparq.data.batch import IGNORE, Batch, collate, pack
from sparq.data.batching import group_by_length, group_packed, training_batches

__all__ = ["IGNORE", "Batch", "collate", "group_by_length", "group_packed", "pack", "training_batches"]
