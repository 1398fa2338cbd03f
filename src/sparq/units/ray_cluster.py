"""Encoding of shards on a Ray cluster: one task is one shard."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sparq.errors import SparqError
from sparq.units.encode import Shard
from sparq.units.workers import MOST_DEATHS, ShardWork, check_mistake, encode_remotely

LOCAL = "local"
"""The address that starts Ray on this machine, for this run only."""


def encode_on_ray(work: ShardWork, address: str, num_workers: int) -> Callable[[Sequence[Shard]], Iterator[Shard]]:
    """Return a runner of shards as tasks of Ray.

    Each task takes one CPU. Audio, feature model and run folder must have the same paths on every machine, as on a
    shared file system. Ray gives a shard out again if its worker or machine dies; if the head dies, the run ends, and
    the same command goes on from the shards that are there.

    Args:
        work: what workers do.
        address: of a running cluster, `HOST:PORT`; `auto` for the one that this machine belongs to; `local` starts one.
        num_workers: CPUs of one that is started; of a running one all are used.

    Raises:
        SparqError: by the runner, if Ray is not installed or not there, for a mistake in a recording, or if workers die
            over and over.
    """

    def run(shards: Sequence[Shard]) -> Iterator[Shard]:
        ray = _start(address, num_workers)
        try:
            task = ray.remote(num_cpus=1, max_retries=MOST_DEATHS)(encode_remotely)
            work_in_store = ray.put(work)
            waiting = iter(shards)
            # Enough tasks to keep every CPU busy, and no more: a large corpus has tens of thousands.
            most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            running: dict[Any, Shard] = {}
            while True:
                while len(running) < most and (shard := next(waiting, None)) is not None:
                    running[task.remote(work_in_store, shard)] = shard
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    shard = running.pop(reference)
                    check_mistake(ray.get(reference))
                    yield shard
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise SparqError(f"Ray failed ({reason}): run the same command again; what is finished is kept") from error
        finally:
            ray.shutdown()

    return run


def _start(address: str, num_workers: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise SparqError("ray is not installed: pip install 'sparq[ray]', or leave units.ray out") from error
    given: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    try:
        if address == LOCAL:
            ray.init(address="local", num_cpus=num_workers, **given)
        else:
            ray.init(address=address, **given)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SparqError(f"no Ray cluster at {address!r} ({reason}): start one with `ray start --head`") from error
    return ray
