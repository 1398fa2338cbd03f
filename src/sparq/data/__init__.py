"""From utterances to padded batches of the four tasks."""

from sparq.data.batching import IGNORE, Batch, collate, group_by_length, training_batches

__all__ = ["IGNORE", "Batch", "collate", "group_by_length", "training_batches"]
