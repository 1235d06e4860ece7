"""The documentation's pages: links, the README's length, the site, what they name."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import documents
from tests.support.documents import PACKAGE, PAGES, ROOT, SITE

ARCHITECTURE = ROOT / "docs" / "architecture.md"


def anchors(page: Path) -> set[str]:
  """The ids of a page's headings."""
  headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
  return {
    re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
    for heading in headings
  }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"https?:", target):
      continue
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    assert file.is_file(), f"{page.name} links to {target}"
    if anchor:
      assert anchor in anchors(file), f"{page.name} links to {target}"


def test_the_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_menu():
  text = (ROOT / "mkdocs.yml").read_text()
  listed = set(re.findall(r"[\w/]+\.md", text))
  assert listed == {str(page.relative_to(SITE)) for page in SITE.rglob("*.md")}


def test_pages_that_the_package_names_exist():
  """In docstrings, --help and errors."""
  for module in PACKAGE.rglob("*.py"):
    for name in re.findall(r"\bdocs/[\w/]+\.md", module.read_text()):
      assert (ROOT / name).is_file(), f"{module.name} names {name}"


def test_files_that_pages_name_exist():
  named = {}
  for page in PAGES:
    for code in documents.inline(page.read_text()):
      for file in re.findall(r"(?:safetydpo_jax|tests|benchmarks)/[\w/]+\.py", code):
        if not re.search("[A-Z]", file):  # ROOM/MODULE.py stands for any
          named.setdefault(file, page.name)
  assert len(named) > 40
  missing = {file for file in named if not (ROOT / file).is_file()}
  assert not missing, {file: named[file] for file in missing}


def test_names_on_the_architecture_page_are_defined_where_it_says():
  """Rows of its tables: a file, then what is said of it."""
  rows = re.findall(r"^\| `(safetydpo_jax/\S+\.py)` \| (.+) \|$", read(), re.MULTILINE)
  checked = 0
  for file, cell in rows:
    text = (ROOT / file).read_text()
    for name in re.findall(r"`(_?[A-Za-z]\w+)`", cell):
      defined = rf"^(?:def |class )?{name}\b(?:\(|:| =|\b)"
      if not re.search(defined, text, re.MULTILINE):
        # A row may compare with a name of a neighbour: then it is used there.
        assert re.search(rf"\b{name}\b", text), f"{file} has no {name}"
      checked += 1
  assert checked > 20


@pytest.mark.parametrize(
  ("table", "module"),
  [
    ("LOSSES", "dpo"),
    ("METHODS", "sampling/methods"),
    ("CLASSES", "sampling/methods"),
    ("DETECTORS", "evaluation/detectors"),
    ("BENCHMARKS", "evaluation/prompt_sets"),
    ("PRESETS", "formats/base_model/hub"),
    ("BASE_RULES", "runtime/sharding"),
    ("CHIPS", "planning/chips"),
  ],
)
def test_a_table_of_the_architecture_page_is_there(table, module):
  assert f"`{table}`" in read()
  assert f"safetydpo_jax/{module}.py" in read()
  text = (PACKAGE / f"{module}.py").read_text()
  assert re.search(rf"^{table}\b.*=", text, re.MULTILINE)


def test_a_lora_goes_through_eight_files_at_most():
  chapter = read().split("### One LoRA")[1].split("\n## ")[0]
  steps = re.findall(r"^\d+\. `(safetydpo_jax/\S+\.py)`", chapter, re.MULTILINE)
  assert 4 <= len(steps) <= 8
  assert (steps[0], steps[-1]) == (
    "safetydpo_jax/training/initial_lora.py",
    "safetydpo_jax/formats/loras/kohya.py",
  )


@pytest.fixture(scope="module")
def layers():
  """The rooms in the linter's order."""
  with open(ROOT / "pyproject.toml", "rb") as file:
    contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
  (layers,) = [c["layers"] for c in contracts if c["type"] == "layers"]
  return layers


def test_every_command_is_among_the_layers(layers):
  named = set(re.findall(r"[\w.]+", " ".join(layers)))
  assert {f"safetydpo_jax.{command}" for command in documents.commands()} <= named


def test_the_picture_of_rooms_has_the_layers_that_the_linter_checks(layers):
  picture = read().split("```text")[1].split("```")[0]
  place = 0
  for layer in layers[2:]:  # above are __main__ and the toy world's commands
    names = [name.rpartition("safetydpo_jax.")[2] for name in re.split(r"[:|]", layer)]
    names = [name.strip().replace(".", "/") for name in names]
    found = [picture.find(name, place) for name in names]
    assert -1 not in found, f"{names} is not there, or out of order"
    place = max(found)


def read() -> str:
  return ARCHITECTURE.read_text()


def mkdocs() -> str | None:
  beside = Path(sys.executable).with_name("mkdocs")
  return str(beside) if beside.is_file() else shutil.which("mkdocs")


@pytest.mark.skipif(not mkdocs(), reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
  result = subprocess.run(
    [mkdocs(), "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "site/commands/train/index.html").is_file()
