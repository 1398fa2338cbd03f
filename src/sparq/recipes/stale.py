"""Whether what a run folder holds is what the recipe would make; if not, which setting differs."""

from collections.abc import Sequence
from pathlib import Path

from sparq.errors import SparqError
from sparq.recipes.jobs import Job
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.stamps import audit, changes

_MAX_REASONS = 4


def check_stale(run_folder: RunFolder, jobs: Sequence[Job]) -> None:
    """Refuse a run folder in which a job was made, or begun, from something else than the recipe says.

    Raises:
        SparqError: the message says what differs and which `--overwrite` would make it again.
    """
    reasons = {job.name: found for job in jobs if (found := _reasons(run_folder, job))}
    # What is stale only because of a step before it goes with that step.
    roots = [job for job in jobs if job.name in reasons and not reasons.keys() & set(job.needs)]
    if not roots:
        return
    texts = list(dict.fromkeys(reason for job in roots for reason in reasons[job.name]))
    shown = ", ".join(texts[:_MAX_REASONS])
    if len(texts) > _MAX_REASONS:
        shown += f" and {len(texts) - _MAX_REASONS} more"
    names = dict.fromkeys(_overwrite_name(job, jobs, roots) for job in roots)
    flags = " ".join(f"--overwrite {name}" for name in names)
    raise SparqError(f"{run_folder.path}: {shown}: use another --out or {flags}")


def _overwrite_name(job: Job, jobs: Sequence[Job], roots: Sequence[Job]) -> str:
    siblings = [other for other in jobs if other.step == job.step]
    return job.step if len(siblings) > 1 and all(other in roots for other in siblings) else job.name


def _reasons(run_folder: RunFolder, job: Job) -> list[str]:
    stamp = run_folder.stamp(job.name)
    present = [path for path in job.owns if _holds_files(run_folder.path / path)]
    if stamp is None:
        return [f"{path} is there, but no {job.name} step of this run made it" for path in present]
    if stamp.state == "discarded":  # its removal was cut off and is finished before it runs
        return []
    if stamp.key != job.key:
        if stamp.state == "started" and not present:  # it failed before it wrote anything
            return []
        return changes(stamp.settings, job.settings) or [
            f"{job.name} was made by another version of sparq or from other inputs"
        ]
    different = [
        f"{need} is not what {job.name} was made from"
        for need, digest in stamp.inputs.items()
        if (before := run_folder.stamp(need)) is not None and before.state == "done" and before.digest != digest
    ]
    _, changed = audit(run_folder.path, stamp.outputs)
    return different + [f"{path} has changed since {job.name} made it" for path in changed]


def _holds_files(path: Path) -> bool:
    return any(not inner.is_dir() for inner in path.rglob("*")) if path.is_dir() else path.exists()
