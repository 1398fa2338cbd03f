"""Faults while a command runs: exit statuses, one line or a traceback, pipes and log handlers."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fake_pipeline
from fake_modules import insert
from sparq.cli.main import main
from sparq.errors import SparqError

SOURCE = Path(__file__).resolve().parent.parent / "src"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return fake_pipeline.write_recipe(tmp_path)


@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        (SparqError("a line\nand another"), 2, "sparq: error: a line and another"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        (MemoryError(), 2, "sparq: error: out of memory; what is finished is kept: "),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            2,
            "sparq: error: No space left on device: /x; what",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            "sparq: error: Permission denied: /x; what",
        ),
    ],
)
def test_faults(
    fault: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def demo(**_: Any) -> None:
        raise fault

    insert(monkeypatch, "sparq.recipes.demo", demo=demo)
    assert main(["demo"]) == status
    captured = capsys.readouterr().err
    assert captured.startswith(line)
    assert captured.count("\n") == 1


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def demo(**_: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    insert(monkeypatch, "sparq.recipes.demo", demo=demo)
    with pytest.raises(OSError, match="Invalid argument"):
        main(["demo"])


def test_a_closed_pipe_is_quiet(file: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sparq", "recipe", str(file), "--show"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_log_handler_goes_with_the_command(file: Path) -> None:
    logger = logging.getLogger("sparq")
    before = list(logger.handlers), logger.level
    assert main(["recipe", str(file)]) == 0
    assert (list(logger.handlers), logger.level) == before
