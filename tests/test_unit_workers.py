"""Shards encoded by other processes, some of which are killed, against one process."""

import contextlib
import dataclasses
import importlib.util
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch

import small_world
from sparq.audio.manifest import Utterance, read_manifest
from sparq.errors import SparqError
from sparq.units import (
    EncodeSettings,
    FeatureSpec,
    KMeansSettings,
    ShardRunner,
    ShardWork,
    encode_in_processes,
    encode_on_ray,
    encode_units,
    fit_units,
    load_extractor,
)
from sparq.units.encode import Shard
from sparq.units.kmeans import KMeans

SPEC = FeatureSpec(model="mfcc")
SETTINGS = EncodeSettings(shard_utterances=1)
NUM_KILLS = 5


@pytest.fixture(autouse=True)
def _as_nice_as_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's workers are of low priority, and would starve where other work keeps the cores busy.
    monkeypatch.setenv("RAY_worker_niceness", str(os.nice(0)))


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Utterance], Path]:
    """Forty utterances, and the folder that one process made of them."""
    folder = tmp_path_factory.mktemp("corpus")
    utterances = read_manifest(small_world.make_corpus(folder / "corpus", utterances=40))
    utterances = [dataclasses.replace(u, path=folder / "corpus" / u.path) for u in utterances]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kmeans = fit_units(
            utterances, load_extractor(SPEC), folder / "one", KMeansSettings(k=8, num_starts=1), max_frames=1000
        )
        encode_units(utterances, load_extractor(SPEC), kmeans, folder / "one", SETTINGS)
    finally:
        torch.set_num_threads(threads)
    return utterances, folder / "one"


def _work(one: Path) -> ShardWork:
    return ShardWork(features=SPEC, kmeans=one / "kmeans.safetensors", dedup=True)


def _encode(corpus: tuple[list[Utterance], Path], folder: Path, runner: ShardRunner | None) -> None:
    utterances, one = corpus
    kmeans = KMeans.load(one / "kmeans.safetensors")
    encode_units(utterances, load_extractor(SPEC), kmeans, folder, SETTINGS, runner=runner)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def _assert_same(one: Path, other: Path) -> None:
    expected = {name: data for name, data in _contents(one).items() if name != "kmeans.safetensors"}
    assert len(expected) == 41  # a shard for each utterance, and the summary
    assert _contents(other) == expected


class Killer:
    """A runner that kills a worker of another one after some of its shards.

    Args:
        runner: the other.
        workers: finds the workers.
        seed: of which shards and which workers.
    """

    def __init__(self, runner: ShardRunner, workers: Callable[[], list[psutil.Process]], seed: int) -> None:
        self._runner, self._workers, self._random = runner, workers, random.Random(seed)
        self.kills, self.seen = 0, list[Path]()

    def __call__(self, shards: Sequence[Shard]) -> Iterator[Shard]:
        when = set(self._random.sample(range(len(shards) - 8), NUM_KILLS))
        due = 0
        for index, shard in enumerate(self._runner(shards)):
            due += index in when
            # None may be alive between two pools: then the next shard has its turn.
            due -= bool(due) and self._kill()
            self.seen.append(shard.path)
            yield shard

    def _kill(self) -> bool:
        if workers := self._workers():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended since
                self._random.choice(workers).send_signal(signal.SIGKILL)
                self.kills += 1
                return True
        return False


def _pool_workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in word for word in process.cmdline())
    except psutil.NoSuchProcess:  # it has just ended, or is a zombie
        return False


def _ray_workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            # Others by that prefix, such as ray::RuntimeEnvAgent, are parts of the node.
            if any(word.startswith(("ray::IDLE", "ray::encode")) for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_killed_workers_lose_and_double_nothing(corpus: tuple[list[Utterance], Path], tmp_path: Path) -> None:
    killer = Killer(encode_in_processes(_work(corpus[1]), 2), _pool_workers, seed=3)
    _encode(corpus, tmp_path, killer)
    assert killer.kills == NUM_KILLS
    assert len(killer.seen) == len(set(killer.seen)) == 40
    _assert_same(corpus[1], tmp_path)


def test_a_mistake_of_a_worker_is_a_line_and_the_rest_goes_on_later(
    corpus: tuple[list[Utterance], Path], tmp_path: Path
) -> None:
    utterances, one = corpus
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    spoiled = [dataclasses.replace(u, path=broken) if i == 20 else u for i, u in enumerate(utterances)]
    with pytest.raises(SparqError, match=r"broken\.wav"):
        _encode((spoiled, one), tmp_path / "units", encode_in_processes(_work(one), 1))
    done = len(list((tmp_path / "units").rglob("*.parquet")))
    assert 0 < done < 40
    _encode(corpus, tmp_path / "units", encode_in_processes(_work(one), 1))
    _assert_same(one, tmp_path / "units")


def _die(work: ShardWork, shard: Shard) -> str | None:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def test_workers_that_always_die_end_the_run(
    corpus: tuple[list[Utterance], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparq.units.workers.encode_remotely", _die)
    monkeypatch.setattr("sparq.units.workers.MOST_DEATHS", 1)
    with pytest.raises(SparqError, match="workers died 2 times without finishing a shard"):
        _encode(corpus, tmp_path, encode_in_processes(_work(corpus[1]), 1))


@needs_ray
def test_rays_killed_workers_lose_and_double_nothing(corpus: tuple[list[Utterance], Path], tmp_path: Path) -> None:
    killer = Killer(encode_on_ray(_work(corpus[1]), "local", 2), _ray_workers, seed=4)
    _encode(corpus, tmp_path, killer)
    assert killer.kills == NUM_KILLS
    assert len(killer.seen) == len(set(killer.seen)) == 40
    _assert_same(corpus[1], tmp_path)


@needs_ray
def test_a_run_goes_on_after_the_head_of_ray_died(corpus: tuple[list[Utterance], Path], tmp_path: Path) -> None:
    utterances, one = corpus
    out = tmp_path / "units"
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, pickle\n"
        "from pathlib import Path\n"
        "from sparq.units import *\n"
        f"utterances, spec, work, settings, out = pickle.loads(Path({str(tmp_path / 'given')!r}).read_bytes())\n"
        "kmeans = KMeans.load(work.kmeans)\n"
        "runner = encode_on_ray(work, 'local', 1)\n"
        "encode_units(utterances, load_extractor(spec), kmeans, out, settings, runner=runner)\n"
    )
    (tmp_path / "given").write_bytes(pickle.dumps((utterances, SPEC, _work(one), SETTINGS, out)))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            if list(out.rglob("*.parquet")):
                break
            assert process.poll() is None, "it ended before the first shard was there"
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        heads = [child for child in children if child.name() in ("gcs_server", "raylet")]
        assert len(heads) == 2
        for head in heads:
            head.kill()
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    assert 0 < len(list(out.rglob("*.parquet"))) < 40
    _encode(corpus, out, encode_on_ray(_work(one), "local", 2))
    _assert_same(one, out)


def test_ray_that_is_not_there_is_a_line(
    corpus: tuple[list[Utterance], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SparqError, match=r"ray is not installed: pip install 'sparq\[ray\]'"):
        _encode(corpus, tmp_path, encode_on_ray(_work(corpus[1]), "local", 1))
