"""What the documents say exists."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch

from sparq.recipes import recipe

REPOSITORY = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.splitlines()


def test_the_readme_tree_has_every_file() -> None:
    """As indented names; `__init__.py` files of inner folders and the adapters' files go without a line."""
    tree = (REPOSITORY / "README.md").read_text().split("## The tree")[1]
    block = re.findall(r"```\n(.*?)```", tree, re.DOTALL)[0]
    named: set[str] = set()
    stack: list[str] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], name.rstrip("/")]
        named.add("/".join(stack))
    files = {
        name for name in tracked() if "/adapters/" not in name and not re.fullmatch(r"src/sparq/.+/__init__\.py", name)
    }
    folders = {str(parent) for name in tracked() for parent in Path(name).parents if str(parent) != "."}
    assert files - named == set()
    assert named - files - folders == set()


def test_every_recipe_key_is_documented() -> None:
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    sections = [getattr(recipe, name) for name in recipe.__all__ if name[0].isupper()]
    for section in filter(dataclasses.is_dataclass, sections):
        for field in dataclasses.fields(section):
            assert f"`{field.name}`" in page, f"{section.__name__}.{field.name}"


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


@pytest.mark.pretrained
def test_the_python_of_the_readme_runs(smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smollm2_folder.exists()
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    batch = names["batch"]
    logits = [names[model](batch.input_ids).logits for model in ("smaller", "again")]  # type: ignore[operator, attr-defined]
    assert torch.equal(*logits)
