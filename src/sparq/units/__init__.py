"""Speech to units: features of a pretrained speech encoder, k-means, shards of units."""

from sparq.units.clustering import KMeansSettings, fit_kmeans
from sparq.units.dedup import deduplicate, expand
from sparq.units.encode import EncodeSettings, ShardRunner, encode_units, encode_waveforms
from sparq.units.features import FeatureExtractor, FeatureSpec, describe, load_extractor
from sparq.units.fit import fit_units, take_units
from sparq.units.kmeans import MAX_UNITS, KMeans
from sparq.units.ray_cluster import encode_on_ray
from sparq.units.store import UnitUtterance, read_summary, read_units
from sparq.units.workers import ShardWork, encode_in_processes

__all__ = [
    "MAX_UNITS",
    "EncodeSettings",
    "FeatureExtractor",
    "FeatureSpec",
    "KMeans",
    "KMeansSettings",
    "ShardRunner",
    "ShardWork",
    "UnitUtterance",
    "deduplicate",
    "describe",
    "encode_in_processes",
    "encode_on_ray",
    "encode_units",
    "encode_waveforms",
    "expand",
    "fit_kmeans",
    "fit_units",
    "load_extractor",
    "read_summary",
    "read_units",
    "take_units",
]
