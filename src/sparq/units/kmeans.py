"""A fitted k-means: centroids that turn frames into units, bound to the extractor they were fitted on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sparq.errors import SparqError
from sparq.files import atomic_path
from sparq.units.features import FeatureExtractor, describe

MAX_UNITS = 0x9FFF - 0x4E00 + 1
"""20992: unit u is written as the character 0x4E00 + u, and the block of these characters ends at 0x9FFF."""

_FORMAT = "sparq-kmeans-1"
_METADATA_KEY = "sparq"
_FRAMES_PER_CHUNK = 65_536


@dataclass(frozen=True, kw_only=True, eq=False)
class KMeans:
    """Centroids and how they came about.

    Attributes:
        centroids: one row per unit.
        metadata: JSON-able facts; "extractor" holds the fingerprint of the feature extractor.
    """

    centroids: Float32[np.ndarray, "k dim"]
    metadata: Mapping[str, Any]

    @property
    def k(self) -> int:
        """The number of units."""
        return len(self.centroids)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the centroids and their metadata."""
        digest = hashlib.sha256(str(self.centroids.shape).encode())
        digest.update(np.ascontiguousarray(self.centroids, dtype="<f4").tobytes())
        digest.update(_to_json(self.metadata).encode())
        return digest.hexdigest()[:16]

    def assign(self, frames: Float32[np.ndarray, "frames dim"]) -> UInt16[np.ndarray, "frames"]:
        """Return the nearest centroid of each frame; of equally near ones, the lowest.

        unit = argmin_c ||x - c||^2 = argmin_c ||c||^2 - 2 x.c, because ||x||^2 is the same for every c.
        """
        nearest, _ = self._nearest(frames)
        return nearest

    def mean_squared_distance(self, frames: Float32[np.ndarray, "frames dim"]) -> float:
        """Return the mean over frames of the squared Euclidean distance to the nearest centroid."""
        _, squared = self._nearest(frames)
        return float(squared.mean(dtype=np.float64))

    def _nearest(
        self, frames: Float32[np.ndarray, "frames dim"]
    ) -> tuple[UInt16[np.ndarray, "frames"], Float32[np.ndarray, "frames"]]:
        assert frames.shape[1] == self.centroids.shape[1], (frames.shape, self.centroids.shape)
        # Features have a large common offset; without it the float32 products keep more of the differences.
        center = torch.from_numpy(self.centroids.mean(axis=0))
        centroids = torch.from_numpy(self.centroids) - center
        bias = centroids.square().sum(dim=1)
        units = np.empty(len(frames), np.uint16)
        squared = np.empty(len(frames), np.float32)
        for first in range(0, len(frames), _FRAMES_PER_CHUNK):
            chunk = torch.from_numpy(frames[first : first + _FRAMES_PER_CHUNK]) - center
            distances = torch.addmm(bias, chunk, centroids.T, alpha=-2.0)  # frames k
            nearest = distances.argmin(dim=1)  # the first of equals
            units[first : first + _FRAMES_PER_CHUNK] = nearest.numpy().astype(np.uint16)
            rest = distances.gather(1, nearest[:, None])[:, 0] + chunk.square().sum(dim=1)
            squared[first : first + _FRAMES_PER_CHUNK] = rest.clamp(min=0).numpy()
        return units, squared

    def check_extractor(self, extractor: FeatureExtractor) -> None:
        """Raise a SparqError that names both extractors unless this k-means was fitted on the given one."""
        fitted = self.metadata["extractor"]
        if fitted != extractor.fingerprint:
            raise SparqError(
                f"the k-means was fitted on {describe(fitted)}, but the extractor in use is "
                f"{describe(extractor.fingerprint)}: fit a new k-means or use the first extractor"
            )

    def save(self, path: Path) -> None:
        """Write the file atomically: tensor "centroids" and the metadata as JSON under the key "sparq"."""
        header = {_METADATA_KEY: _to_json({"format": _FORMAT, **self.metadata})}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save({"centroids": self.centroids}, metadata=header))

    @classmethod
    def load(cls, path: Path) -> "KMeans":
        """Read what `save` wrote.

        Raises:
            SparqError: there is no such file, or it is not a k-means.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                names = set(file.keys())
                centroids = file.get_tensor("centroids") if names == {"centroids"} else None
        except FileNotFoundError as error:
            raise SparqError(f"no k-means at {path}: run `sparq units` first") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise SparqError(f"{path} is not a k-means file: {str(error).splitlines()[0]}") from error
        if centroids is None or not isinstance(metadata, dict) or metadata.pop("format", None) != _FORMAT:
            raise SparqError(f"{path} is not a k-means file: expected one tensor 'centroids' of format {_FORMAT}")
        fits = centroids.ndim == 2 and centroids.dtype == np.float32 and 2 <= len(centroids) <= MAX_UNITS
        if not fits or not np.isfinite(centroids).all() or not isinstance(metadata.get("extractor"), dict):
            raise SparqError(
                f"{path} is not a k-means file: expected finite float32 centroids [k, dim] and "
                f"the extractor, found {centroids.dtype} {list(centroids.shape)}"
            )
        return cls(centroids=centroids, metadata=metadata)


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
