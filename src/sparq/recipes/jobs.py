"""Steps as they are written down, and jobs: the steps of one recipe, each with a key of its whole origin."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparq.errors import SparqError
from sparq.files import fingerprint, sha256_file
from sparq.recipes.recipe import Recipe
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.stamps import STAMP_FORMAT


def no_files(recipe: Recipe) -> Iterable[Path]:  # noqa: ARG001
    """The files that a step reads from outside of the run folder, if it reads none."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that runs once.

    Attributes:
        name: name of the step, of its subcommand and of its stamp.
        needs: names of the steps whose outputs it reads. A step of each framework counts with all frameworks.
        config: the settings that it uses, as nested mappings; see `used_settings`. If one changes, the step
            is stale.
        run: does the work and returns the files, or folders, that it made. It must be able to go on from its
            own unfinished files.
        owns: the paths in the run folder that only this step writes; `--overwrite` removes them.
        files: files outside of the run folder whose content it reads.
        version: raised when the code makes something else from the same settings.
    """

    name: str
    needs: tuple[str, ...]
    config: Callable[[Recipe], Mapping[str, Any]]
    run: Callable[[Recipe, RunFolder], list[Path]]
    owns: tuple[str, ...]
    files: Callable[[Recipe], Iterable[Path]] = no_files
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class FrameworkStep:
    """A step that runs once for each framework, under the stamp `NAME-FRAMEWORK`.

    Attributes:
        name: name of the step and of its subcommand.
        needs: as in `Step`; of another step of each framework, only the same framework's part is needed.
        config: as in `Step`, the same for all frameworks.
        run: as in `Step`, with the framework as third argument.
        owns: as in `Step`, with `{framework}` in every path.
        files: as in `Step`.
        version: as in `Step`.
    """

    name: str
    needs: tuple[str, ...]
    config: Callable[[Recipe], Mapping[str, Any]]
    run: Callable[[Recipe, RunFolder, str], list[Path]]
    owns: tuple[str, ...]
    files: Callable[[Recipe], Iterable[Path]] = no_files
    version: int = 1


Steps = tuple[Step | FrameworkStep, ...]
"""All steps of a pipeline, each after those that it needs."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step with the recipe filled in: the unit of work that has a stamp.

    Attributes:
        name: name of the stamp.
        step: name of the step.
        key: fingerprint of all that decides the result.
        settings: the settings that are part of the key.
        needs: names of the jobs whose outputs it reads.
        owns: paths relative to the run folder.
        run: does the work.
    """

    name: str
    step: str
    key: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...]
    owns: tuple[str, ...]
    run: Callable[[Recipe, RunFolder], list[Path]]


def plan(recipe: Recipe, steps: Sequence[Step | FrameworkStep]) -> tuple[Job, ...]:
    """Return the jobs of a recipe in the order of the steps.

    Raises:
        SparqError: a file that a step reads is missing.
    """
    jobs: list[Job] = []
    digests: dict[Path, str] = {}
    for step in steps:
        settings = dict(step.config(recipe))
        files = [Path(path) for path in step.files(recipe)]
        for path in files:
            if path not in digests:
                digests[path] = _digest(path)
        if files:
            settings["files"] = {str(path): digests[path] for path in files}
        settings = json.loads(json.dumps(settings))  # as the stamp will hold it: tuples are lists
        frameworks: tuple[str | None, ...] = recipe.frameworks if isinstance(step, FrameworkStep) else (None,)
        parts = [_job(step, framework, settings, jobs) for framework in frameworks]
        jobs += parts
    owned = [path for job in jobs for path in job.owns]
    assert len(set(owned)) == len(owned), f"two steps own the same path: {sorted(owned)}"
    return tuple(jobs)


def _job(step: Step | FrameworkStep, framework: str | None, settings: Mapping[str, Any], before: list[Job]) -> Job:
    known = {job.step for job in before}
    assert set(step.needs) <= known, f"{step.name} needs {step.needs}, but only {known} come before it"
    needed = [job for job in before if job.step in step.needs]
    if isinstance(step, FrameworkStep):
        assert framework is not None
        # Another framework's model is no business of this one.
        needed = [job for job in needed if job.name in (job.step, f"{job.step}-{framework}")]
        name = f"{step.name}-{framework}"
        run: Callable[[Recipe, RunFolder], list[Path]] = partial(_run_framework, step.run, framework)
        owns = tuple(path.format(framework=framework) for path in step.owns)
    else:
        name, run, owns = step.name, step.run, step.owns
    key = fingerprint(STAMP_FORMAT, name, step.version, settings, [job.key for job in needed])
    needs = tuple(job.name for job in needed)
    return Job(name=name, step=step.name, key=key, settings=settings, needs=needs, owns=owns, run=run)


def _run_framework(
    run: Callable[[Recipe, RunFolder, str], list[Path]], framework: str, recipe: Recipe, folder: RunFolder
) -> list[Path]:
    return run(recipe, folder, framework)


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except FileNotFoundError as error:
        raise SparqError(f"no such file: {path}") from error
    except OSError as error:
        raise SparqError(f"cannot read {path}: {error.strerror}") from error
