"""Encoding of shards by other processes: what a worker is told, and workers on this machine."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from sparq.errors import SparqError
from sparq.units.encode import Shard, encode_shard
from sparq.units.features import FeatureExtractor, FeatureSpec, load_extractor
from sparq.units.kmeans import KMeans

MOST_DEATHS = 10
"""Workers that may die over one shard before the run gives up."""


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """How a worker encodes any shard: little enough to be sent along with each.

    Attributes:
        features: the extractor; its model must be where every worker finds it.
        kmeans: file of the centroids, likewise.
        dedup: write a run of equal units once.
    """

    features: FeatureSpec
    kmeans: Path
    dedup: bool


def encode_remotely(work: ShardWork, shard: Shard) -> str | None:
    """Encode one shard in a worker; return a mistake in one line, or None.

    The extractor is loaded by the first shard of a process. A worker computes with one thread, so that units do not
    depend on how many cores its machine has.
    """
    torch.set_num_threads(1)
    try:
        extractor, kmeans = _load(work.features, work.kmeans)
        encode_shard(shard, extractor, kmeans, dedup=work.dedup)
    except SparqError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _load(features: FeatureSpec, kmeans: Path) -> tuple[FeatureExtractor, KMeans]:
    return load_extractor(features), KMeans.load(kmeans)


def encode_in_processes(work: ShardWork, num_workers: int) -> Callable[[Sequence[Shard]], Iterator[Shard]]:
    """Return a runner of shards in `num_workers` processes of this machine.

    A shard is whole or absent, so the shards of a worker that dies (`kill -9`, out of memory) are given out again.

    Raises:
        SparqError: by the runner, for a mistake in a recording, or if workers die over and over.
    """

    def run(shards: Sequence[Shard]) -> Iterator[Shard]:
        left = {shard.path: shard for shard in shards}
        deaths = 0
        while left:
            try:
                for shard in _in_pool(work, list(left.values()), num_workers):
                    del left[shard.path]
                    deaths = 0
                    yield shard
            except BrokenProcessPool:
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise SparqError(
                        f"workers died {deaths} times without finishing a shard, the first of them {next(iter(left))}:"
                        " if memory is short, take fewer workers"
                    ) from None

    return run


def _in_pool(work: ShardWork, shards: Sequence[Shard], num_workers: int) -> Iterator[Shard]:
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    waiting = iter(shards)
    pool = ProcessPoolExecutor(max_workers=num_workers, mp_context=context)
    try:
        running: dict[Future[str | None], Shard] = {}
        while True:
            while len(running) < 2 * num_workers and (shard := next(waiting, None)) is not None:
                running[pool.submit(encode_remotely, work, shard)] = shard
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                shard = running.pop(future)
                check_mistake(future.result())
                yield shard
    finally:
        pool.shutdown(cancel_futures=True)


def check_mistake(mistake: str | None) -> None:
    """Raise what a worker returned as a mistake.

    Raises:
        SparqError: it is one.
    """
    if mistake is not None:
        raise SparqError(mistake)
