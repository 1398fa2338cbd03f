"""Real pretrained models without a model hub, and references to models in general."""

from sparq.pretrained.cache import (
    PRETRAINED_NAMES,
    PretrainedName,
    default_cache,
    pretrained_folder,
    resolve_model,
    weights_note,
)

__all__ = [
    "PRETRAINED_NAMES",
    "PretrainedName",
    "default_cache",
    "pretrained_folder",
    "resolve_model",
    "weights_note",
]
