"""The runner of steps: it does what is missing, keeps what is done and never overwrites unasked."""

import logging
import resource
import sys
import time
from collections.abc import Collection, Iterable, Sequence

from sparq.configuration import dump_yaml, to_mapping
from sparq.errors import SparqError, unknown
from sparq.files import write_text
from sparq.process_memory import reset_peak, resident_bytes
from sparq.recipes.jobs import FrameworkStep, Job, Step, plan
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.stale import check_stale
from sparq.recipes.stamps import audit

__all__ = ["FrameworkStep", "Job", "Step", "plan", "run_steps"]

_LOG = logging.getLogger(__name__)


def run_steps(
    recipe: Recipe,
    run_folder: RunFolder,
    steps: Sequence[Step | FrameworkStep],
    *,
    until: str | None = None,
    only: str | None = None,
    overwrite: Collection[str] = (),
) -> None:
    """Do the steps that are not done yet, and record time, memory and hashes of each.

    Args:
        recipe: the checked recipe.
        run_folder: where everything goes.
        steps: all steps, each after those that it needs.
        until: the last step to do.
        only: do this step alone; those that it needs must be done.
        overwrite: steps to throw away first, with all steps that need them; names of steps or of stamps.

    Raises:
        SparqError: a name is unknown, the folder is in use, it was made from other settings, or a step fails.
    """
    jobs = plan(recipe, steps)
    selected = _select(jobs, until, only)
    discarded = _with_dependents(jobs, overwrite)
    with run_folder.lock():
        request = {job.name: job.key for job in jobs if job.name in discarded}
        if request and run_folder.read_overwriting() == request:
            # The same command was cut off after it had removed these: going on must not remove what is new.
            _LOG.info("going on with the interrupted run that overwrote %s", ", ".join(overwrite))
            discarded = set()
        check_stale(run_folder, [job for job in jobs if job.name not in discarded])
        if only is not None:
            _check_needs(run_folder, jobs, selected, discarded)
        _discard(run_folder, jobs, discarded)
        if discarded:
            run_folder.write_overwriting(request)
        write_text(run_folder.recipe, dump_yaml(to_mapping(recipe)))
        for job in selected:
            _run(recipe, run_folder, job)
        run_folder.write_overwriting({})


def _select(jobs: Sequence[Job], until: str | None, only: str | None) -> list[Job]:
    assert until is None or only is None, "until and only exclude each other"
    if only is not None:
        return _named(jobs, only)
    if until is not None:
        last = _named(jobs, until)[-1]
        return list(jobs[: jobs.index(last) + 1])
    return list(jobs)


def _named(jobs: Sequence[Job], name: str) -> list[Job]:
    found = [job for job in jobs if name in (job.step, job.name)]
    if not found:
        raise unknown("step", name, dict.fromkeys(label for job in jobs for label in (job.step, job.name)))
    return found


def _with_dependents(jobs: Sequence[Job], names: Iterable[str]) -> set[str]:
    result = {job.name for name in names for job in _named(jobs, name)}
    for job in jobs:  # each stands after those that it needs
        if result.intersection(job.needs):
            result.add(job.name)
    return result


def _check_needs(run_folder: RunFolder, jobs: Sequence[Job], selected: list[Job], discarded: set[str]) -> None:
    by_name = {job.name: job for job in jobs}
    for job in selected:
        for name in job.needs:
            need = by_name[name]
            if name in discarded or not run_folder.is_done(name, need.key):
                raise SparqError(
                    f"{job.step} needs {name}, which is not done in {run_folder.path}: "
                    f"run `sparq {need.step}` first, or `sparq run` for all steps"
                )


def _discard(run_folder: RunFolder, jobs: Sequence[Job], discarded: set[str]) -> None:
    for job in reversed(jobs):  # dependents first: what remains after a cut is consistent
        stamp = run_folder.stamp(job.name)
        if job.name in discarded or (stamp is not None and stamp.state == "discarded"):
            owned = [run_folder.path / path for path in job.owns]
            if stamp is not None or any(path.exists() for path in owned):
                run_folder.discard(job.name, owned)
                _LOG.info("%s: removed, to be made again", job.name)


def _run(recipe: Recipe, run_folder: RunFolder, job: Job) -> None:
    check_stale(run_folder, [job])  # again: an earlier step may just have made something else than before
    stamp = run_folder.stamp(job.name)
    if stamp is not None and stamp.state == "done":
        missing, _ = audit(run_folder.path, stamp.outputs)
        if not missing:
            _LOG.info("%s: already done", job.name)
            return
        _LOG.info("%s: %s is missing, running again", job.name, missing[0])
    inputs = {need: _done_digest(run_folder, need) for need in job.needs}
    started = run_folder.mark_started(job.name, job.key, settings=job.settings, inputs=inputs)
    _LOG.info("%s: %s", job.name, "started" if started.attempts == 1 else "resumed")
    children_before = _reset_peak_memory()
    start = time.perf_counter()
    outputs = job.run(recipe, run_folder)
    seconds = time.perf_counter() - start
    owned = [run_folder.path / path for path in job.owns]
    for path in outputs:
        assert any(path.is_relative_to(place) for place in owned), f"{job.name} made {path}, which it does not own"
    run_folder.mark_done(
        job.name,
        job.key,
        outputs,
        settings=job.settings,
        inputs=inputs,
        attempts=started.attempts,
        seconds=round(seconds, 3),
        peak_memory_bytes=_peak_memory_bytes(children_before),
    )
    _LOG.info("%s: done in %.1f s", job.name, seconds)


def _done_digest(run_folder: RunFolder, name: str) -> str:
    stamp = run_folder.stamp(name)
    assert stamp is not None, f"{name} must be done before what needs it"
    assert stamp.state == "done", f"{name} must be done before what needs it"
    return stamp.digest


def _reset_peak_memory() -> int:
    """Let the peak of this process start anew and return the peak of its finished children, which nothing resets."""
    # Without this the peak of a large step would be counted for all later ones. Only Linux can do it;
    # elsewhere the figure is the peak of the process so far.
    reset_peak()
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _peak_memory_bytes(children_before: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB, but bytes on macOS
    own = resident_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # A child's peak is of this step only if it is higher than all before.
    return max(own, children * unit if children > children_before else 0)
