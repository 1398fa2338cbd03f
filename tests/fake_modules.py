"""Modules that stand in for heavy ones."""

import sys
import types
from typing import Any

import pytest


def insert(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Make `import name` give a module with these members, for one test."""
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
