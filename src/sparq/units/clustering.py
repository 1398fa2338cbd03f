"""Fitting of a k-means to frames, by scikit-learn."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from sparq.errors import SparqError
from sparq.units.kmeans import MAX_UNITS, KMeans


@dataclass(frozen=True, kw_only=True)
class KMeansSettings:
    """Settings of the field (fairseq's and ESPnet's HuBERT recipes; SpARQ takes k = 200, section 4.1).

    Attributes:
        k: number of units.
        seed: of the initial centroids and the mini-batches.
        batch_frames: frames of a mini-batch.
        max_epochs: passes over the frames at most.
        patience: stop after so many mini-batches without improvement.
        num_starts: initial guesses by k-means++, of which the best on a sample is taken.
    """

    k: int = 200
    seed: int = 0
    batch_frames: int = 10_000
    max_epochs: int = 100
    patience: int = 100
    num_starts: int = 20

    def __post_init__(self) -> None:
        if not 2 <= self.k <= MAX_UNITS:
            raise SparqError(f"number of units {self.k} is out of range: valid are 2 to {MAX_UNITS}")
        for name in ("batch_frames", "max_epochs", "patience", "num_starts"):
            if getattr(self, name) < 1:
                raise SparqError(f"k-means setting {name} is {getattr(self, name)}: it must be at least 1")


def fit_kmeans(
    frames: Float32[np.ndarray, "frames dim"],
    settings: KMeansSettings,
    *,
    extractor: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> KMeans:
    """Fit by mini-batch k-means (Sculley 2010): k-means++ starts, no reassignment of small clusters.

    The same frames and settings give the same centroids. For that, scikit-learn runs without OpenMP threads,
    whose sums depend on the order in which they finish; matrix products keep their threads.

    Args:
        frames: all frames, in memory.
        settings: number of units, seed and effort.
        extractor: fingerprint of the extractor that made the frames.
        facts: more to keep in the metadata.

    Raises:
        SparqError: fewer frames than units, or frames that are not finite.
    """
    if len(frames) < settings.k:
        raise SparqError(
            f"{len(frames)} frames of speech are too few for {settings.k} units: add audio or lower the number of units"
        )
    if not np.isfinite(frames).all():
        raise SparqError("the features hold NaN or infinity: check the audio, or try features in float32")
    model = MiniBatchKMeans(
        n_clusters=settings.k,
        init="k-means++",
        n_init=settings.num_starts,
        batch_size=settings.batch_frames,
        max_iter=settings.max_epochs,
        max_no_improvement=settings.patience,
        tol=0.0,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=settings.seed,
    )
    with threadpool_limits(limits=1, user_api="openmp"):
        model.fit(frames)
    centroids = np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)
    fitted = KMeans(centroids=centroids, metadata={"extractor": extractor})
    metadata = {
        "extractor": dict(extractor),
        "settings": dataclasses.asdict(settings),
        "num_frames": len(frames),
        # Rounded, so that the order of a sum does not change the fingerprint.
        "mean_squared_distance": float(f"{fitted.mean_squared_distance(frames):.5g}"),
        **(facts or {}),
    }
    return KMeans(centroids=centroids, metadata=metadata)
