"""A run folder: where everything is, which steps are done, and a lock against a second process."""

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparq.errors import SparqError
from sparq.files import read_json, remove, sweep, write_json
from sparq.recipes.stamps import Stamp, audit, describe_outputs, read_stamp, write_stamp


class RunFolder:
    """The folder of one run, made from one recipe.

    Attributes:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def recipe(self) -> Path:
        """The recipe with its paths resolved."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """All accepted utterances, tab separated: id, path, speaker, split, seconds, corpus, text."""
        return self.path / "manifest.tsv"

    @property
    def prepare(self) -> Path:
        """Counts of utterances, hours and speakers."""
        return self.path / "prepare.json"

    @property
    def rejected(self) -> Path:
        """The rejected recordings, and why."""
        return self.path / "rejected.jsonl"

    @property
    def units(self) -> Path:
        """Folder of the k-means and the units."""
        return self.path / "units"

    @property
    def kmeans(self) -> Path:
        """The centroids."""
        return self.units / "kmeans.safetensors"

    def units_split(self, split: str) -> Path:
        """Folder of the Parquet shards of a split."""
        return self.units / split

    @property
    def vocab(self) -> Path:
        """Folder of the joint vocabulary: joint.model and vocabulary.json."""
        return self.path / "vocab"

    def model(self, framework: str) -> Path:
        """Folder of an adapted model."""
        return self.path / "models" / framework

    def quantized(self, framework: str, scheme: str | None = None) -> Path:
        """Folder of a quantized model, or of all of a framework's."""
        folder = self.path / "quantized" / framework
        return folder if scheme is None else folder / scheme

    def evaluation(self, framework: str, precision: str | None = None) -> Path:
        """The metrics of a model at one precision, or the folder of all of a framework's."""
        folder = self.path / "evaluation" / framework
        return folder if precision is None else folder / f"{precision}.json"

    def samples(self, framework: str, precision: str) -> Path:
        """Folder of some utterances as a model spoke them."""
        return self.evaluation(framework) / f"{precision}-speech"

    def references(self, framework: str) -> Path:
        """What the recognizer of TTS makes of the recordings themselves."""
        return self.evaluation(framework) / "references.json"

    @property
    def results(self) -> Path:
        """Every number of the report, and where it comes from."""
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    @property
    def steps(self) -> Path:
        """Folder of the stamps."""
        return self.path / ".steps"

    def create(self) -> None:
        """Make the folder, or accept one that holds a run.

        Raises:
            SparqError: the path is a file, or a folder with other things in it, or cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise SparqError(f"{self.path} is a file: --out expects a folder, new or of an earlier run")
        try:
            if self.path.is_dir() and not self.steps.is_dir() and any(self.path.iterdir()):
                raise SparqError(f"{self.path} holds files but no run: --out expects a new folder or an earlier run's")
            self.steps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SparqError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process alone, and clean up what a killed process left half-written.

        The kernel drops the lock when the process ends in whatever way, so that no stale lock remains.

        Raises:
            SparqError: another process holds it; the message has its process id.
        """
        self.create()
        descriptor = os.open(self.steps / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                # Forked workers share the lock, so the process named may be gone while a worker lingers.
                owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
                raise SparqError(
                    f"{self.path} is in use by process {owner}: wait until it ends or use another --out"
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            sweep(self.path)  # under the lock nobody else writes here
            yield
        finally:
            os.close(descriptor)

    def stamp_path(self, name: str) -> Path:
        """The stamp of a step: `units.json`, or `train-softmax1.json` for a step of each framework."""
        return self.steps / f"{name}.json"

    def stamp(self, name: str) -> Stamp | None:
        """Return the stamp of a step, or None if it never started."""
        return read_stamp(self.stamp_path(name))

    def is_done(self, name: str, key: str) -> bool:
        """Tell whether a step has finished with this key and all that it made is still there, unchanged."""
        stamp = self.stamp(name)
        if stamp is None or stamp.state != "done" or stamp.key != key:
            return False
        return audit(self.path, stamp.outputs) == ([], [])

    def mark_started(self, name: str, key: str, *, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Stamp:
        """Record that a step starts, so that its unfinished files are known to be of this key."""
        before = self.stamp(name)
        attempts = before.attempts + 1 if before and before.key == key and before.state == "started" else 1
        stamp = Stamp(state="started", key=key, settings=dict(settings), inputs=dict(inputs), attempts=attempts)
        write_stamp(self.stamp_path(name), stamp)
        return stamp

    def mark_done(
        self,
        name: str,
        key: str,
        outputs: Iterable[Path],
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        attempts: int = 1,
        seconds: float | None = None,
        peak_memory_bytes: int | None = None,
    ) -> Stamp:
        """Record that a step has finished, with the hashes of what it made.

        Args:
            name: name of the stamp.
            key: the step's key.
            outputs: files, or folders of which every file counts.
            settings: the settings that it used.
            inputs: digests of the steps that it needs.
            attempts: how often it was started.
            seconds: wall time.
            peak_memory_bytes: largest resident memory.
        """
        stamp = Stamp(
            state="done",
            key=key,
            settings=dict(settings),
            inputs=dict(inputs),
            outputs=describe_outputs(self.path, outputs),
            attempts=attempts,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write_stamp(self.stamp_path(name), stamp)
        return stamp

    def read_overwriting(self) -> dict[str, str]:
        """Return the keys of the steps that an unfinished command has removed to make them again."""
        path = self.steps / "overwriting"
        return dict(read_json(path)) if path.exists() else {}

    def write_overwriting(self, keys: Mapping[str, str]) -> None:
        """Remember what a command has removed to make it again, or with no keys, that it has finished."""
        path = self.steps / "overwriting"
        write_json(path, dict(keys)) if keys else remove(path)

    def discard(self, name: str, owned: Iterable[Path]) -> None:
        """Remove what a step made, then its stamp, which after a cut says that this is to be finished."""
        stamp = Stamp(state="discarded", key="", settings={}, inputs={})
        write_stamp(self.stamp_path(name), stamp)
        for path in owned:
            assert path.is_relative_to(self.path), f"{path} is outside of {self.path}"
            assert path != self.path, "a step owns parts of the run folder, never all of it"
            remove(path)
        remove(self.stamp_path(name))
