"""Simulate the encoding of a large corpus: time, bytes, failures, cost. Every assumption is an argument.

python scripts/scale_plan.py --hours 60000 --workers 64 --speed 150
"""

import argparse
import heapq
import random
from dataclasses import dataclass

FRAME_RATE = 50


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one simulated run came to.

    Attributes:
        wall_hours: from the first shard to the last.
        failures: workers that died.
        lost_hours: worker hours spent on shards that were not finished, and on starting again.
        worker_hours: all worker hours that were paid, idle ends included.
    """

    wall_hours: float
    failures: int
    lost_hours: float
    worker_hours: float


def simulate(
    *, hours: float, workers: int, speed: float, shard_hours: float, failures_a_day: float, restart: float, seed: int
) -> Outcome:
    """Play the run: each worker takes the next shard; it dies at exponential times and starts over with that shard.

    Args:
        hours: of speech.
        workers: that encode side by side.
        speed: hours of speech that a worker encodes in an hour.
        shard_hours: hours of speech in a shard.
        failures_a_day: of one worker, on average.
        restart: hours until a worker that died is back, its model loaded.
        seed: of the failures.
    """
    random_ = random.Random(seed)
    num_shards = max(1, round(hours / shard_hours))
    seconds_of_work = hours / num_shards / speed
    rate = failures_a_day / 24
    free = [(0.0, worker) for worker in range(workers)]
    dies = [random_.expovariate(rate) if rate else float("inf") for _ in range(workers)]
    failures, lost, end = 0, 0.0, 0.0
    for _ in range(num_shards):
        now, worker = heapq.heappop(free)
        while dies[worker] < now + seconds_of_work:
            begun = now
            now = max(now, dies[worker]) + restart
            lost += now - begun
            failures += 1
            dies[worker] = now + random_.expovariate(rate)
        now += seconds_of_work
        end = max(end, now)
        heapq.heappush(free, (now, worker))
    return Outcome(wall_hours=end, failures=failures, lost_hours=lost, worker_hours=end * workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=60_000, help="hours of speech")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64], help="workers, each a GPU or a core")
    parser.add_argument("--speed", type=float, default=150, help="hours of speech a worker encodes in an hour")
    parser.add_argument("--shard-hours", type=float, default=1.0, help="hours of speech in a shard; at most one here")
    parser.add_argument("--failures-a-day", type=float, default=1.0, help="deaths of one worker a day")
    parser.add_argument("--restart-minutes", type=float, default=5.0, help="until a worker that died works again")
    parser.add_argument("--price", type=float, default=2.0, help="of a worker hour")
    parser.add_argument("--audio-kbit", type=float, default=64, help="of the stored audio, a second")
    parser.add_argument("--dim", type=int, default=768, help="numbers of a frame's features")
    parser.add_argument("--sample-frames", type=float, default=1e7, help="frames that k-means is fitted on")
    parser.add_argument("--runs-ratio", type=float, default=0.6, help="units left of a frame by de-duplication")
    parser.add_argument("--seeds", type=int, default=5, help="simulated runs")
    given = parser.parse_args()

    frames = given.hours * 3600 * FRAME_RATE
    print(f"{given.hours:,.0f} h of speech, {frames:.3g} frames, {given.hours / given.shard_hours:,.0f} shards\n")
    print("| bytes | |\n|---|---|")
    print(f"| audio at {given.audio_kbit:g} kbit/s | {given.hours * 3600 * given.audio_kbit * 125 / 1e12:,.2f} TB |")
    print(f"| features of {given.dim} float16, if they were kept | {frames * given.dim * 2 / 1e12:,.1f} TB |")
    print(f"| the k-means sample, float32 in memory | {given.sample_frames * given.dim * 4 / 1e9:,.1f} GB |")
    print(f"| units and durations, 2 bytes each, uncompressed | {frames * given.runs_ratio * 4 / 1e9:,.1f} GB |")
    print("\n| workers | wall days | worker hours | deaths a day | hours lost | cost |\n|---|---|---|---|---|---|")
    for workers in given.workers:
        outcomes = [
            simulate(
                hours=given.hours, workers=workers, speed=given.speed, shard_hours=given.shard_hours,
                failures_a_day=given.failures_a_day, restart=given.restart_minutes / 60, seed=seed,
            )
            for seed in range(given.seeds)
        ]  # fmt: skip
        wall, failures, lost, paid = (
            sum(getattr(o, name) for o in outcomes) / len(outcomes)
            for name in ("wall_hours", "failures", "lost_hours", "worker_hours")
        )
        print(
            f"| {workers} | {wall / 24:.2f} | {paid:,.0f} | {24 * failures / wall:.1f} | {lost:.1f} | "
            f"{paid * given.price:,.0f} |"
        )


if __name__ == "__main__":
    main()
