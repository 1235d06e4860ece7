"""The wheel: what it holds, what it says of itself, and that it works by itself."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from safetydpo_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "requirements.txt")
FOLDERS = ("safetydpo_jax", "configs", "tests")
# Files that are no modules, by folder; nothing else but modules is inside.
DATA = ("report/", "data/writing/templates/", "toyworld/model/", "py.typed")


def build(kind: str, folder: Path) -> Path:
  """Builds from a copy, as setuptools leaves files beside the sources."""
  source = folder / "source"
  if not source.exists():
    source.mkdir()
    for name in SOURCES:
      shutil.copy(ROOT / name, source)
    for name in FOLDERS:
      ignore = shutil.ignore_patterns("__pycache__")
      shutil.copytree(ROOT / name, source / name, ignore=ignore)
  code = (
    "import sys; from setuptools import build_meta; "
    f"build_meta.build_{kind}(sys.argv[1])"
  )
  subprocess.run(
    [sys.executable, "-c", code, str(folder)],
    cwd=source,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    check=True,
    capture_output=True,
  )
  [built] = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
  return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel):
  with zipfile.ZipFile(wheel) as archive:
    return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel):
  with zipfile.ZipFile(wheel) as archive:
    [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    return Parser().parsestr(archive.read(name).decode())


def files(folder: Path) -> set[str]:
  """Below `folder`, with its name; without what Python leaves there."""
  return {
    file.relative_to(folder.parent).as_posix()
    for file in folder.rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
  }


def test_the_wheel_holds_the_package_and_nothing_else(names):
  ours = {name for name in names if ".dist-info/" not in name}
  assert ours == files(ROOT / "safetydpo_jax")


def test_what_is_no_module_is_expected(names):
  data = {name for name in names if name.startswith("safetydpo_jax/")}
  data = {name.partition("/")[2] for name in data if not name.endswith(".py")}
  assert all(name.startswith(DATA) for name in data), data
  assert {
    "py.typed",
    "report/style.css",
    "data/writing/templates/pairs.toml",
    "toyworld/model/unet/diffusion_pytorch_model.safetensors",
  } <= data
  assert any(name.startswith("report/templates/") for name in data)


def test_metadata(metadata):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert metadata["Name"] == "safetydpo-jax"
  assert metadata["Version"] == project["version"]
  assert metadata["Requires-Python"] == ">=3.11"
  assert metadata["License-Expression"] == "Apache-2.0"
  assert metadata["Description-Content-Type"] == "text/markdown"
  assert metadata["Keywords"]
  assert "Typing :: Typed" in metadata.get_all("Classifier")
  assert any("arxiv.org" in url for url in metadata.get_all("Project-URL"))
  assert set(metadata.get_all("Provides-Extra")) == {
    *("evaluate", "report", "prompts", "dev")
  }


def test_the_ten_packages_and_the_extras_are_asked_for(metadata):
  wanted = metadata.get_all("Requires-Dist")
  plain = {line.partition(";")[0] for line in wanted if "extra ==" not in line}
  assert any(re.match("jax[<>=]", line) for line in plain), plain
  assert not any(line.startswith(("torch", "matplotlib", "nudenet")) for line in plain)
  for package, extra in {
    "nudenet": "evaluate",
    "ftfy": "evaluate",
    "matplotlib": "report",
    "httpx2": "prompts",
    "pytest": "dev",
  }.items():
    assert any(
      line.startswith(package) and f'extra == "{extra}"' in line for line in wanted
    )


def test_the_console_script(wheel):
  with zipfile.ZipFile(wheel) as archive:
    [name] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    text = archive.read(name).decode()
  assert "safetydpo = safetydpo_jax.__main__:console_script" in text


def test_the_sdist_builds_the_same_wheel(tmp_path, names):
  with tarfile.open(build("sdist", tmp_path)) as archive:
    inside = {name.partition("/")[2] for name in archive.getnames()}
  assert set(SOURCES) <= inside
  assert {name for name in names if name.startswith("safetydpo_jax/")} <= inside


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """The folder of executables of an environment that has the wheel.

  Its other packages are those that the tests run with.
  """
  folder = tmp_path_factory.mktemp("environment")
  subprocess.run(
    [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True
  )
  python = folder / "bin/python"
  [packages] = folder.glob("lib/python*/site-packages")
  others = "\n".join(site.getsitepackages())
  subprocess.run(
    [
      *[sys.executable, "-m", "pip", "--python", str(python), "install"],
      *["--no-deps", "--no-index", "--quiet", str(wheel)],
    ],
    check=True,
  )
  (packages / "others.pth").write_text(others + "\n")
  return folder / "bin"


def run(installed: Path, folder: Path, line: str) -> subprocess.CompletedProcess:
  drop = ("PYTHONPATH", "JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL")
  environment = {k: v for k, v in os.environ.items() if k not in drop}
  done = subprocess.run(
    [installed / "safetydpo", *line.split()],
    cwd=folder,
    env=environment | {"HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done


PIPELINE = """
toyworld.prompts --kind pairs --category hate --out world/prompts.csv --per_category 8
generate --model toy --prompts world/prompts.csv --out world --steps 2
encode --model toy --pairs world --out world/cache
train --config hate:toy --workdir world/hate --config.cache=world/cache --config.steps=2
toyworld.prompts --kind test --category hate --out world/test.csv --per_category 4
generate --model toy --lora world/hate --compare --no_blur --prompts world/test.csv
evaluate --images world/images --reference world/images/base --prompts world/test.csv
"""


@pytest.mark.slow
def test_an_installed_wheel_runs_the_toy_pipeline(installed, tmp_path):
  where = run_python(installed, "import safetydpo_jax; print(safetydpo_jax.__file__)")
  assert Path(where.strip()).is_relative_to(installed.parent)
  assert all(name in run(installed, tmp_path, "--help").stdout for name in COMMANDS)
  *lines, attack, evaluate = PIPELINE.strip().splitlines()
  for line in (
    *lines,
    f"{attack} --out world/images --steps 2",
    f"{evaluate} --detector toy --out world/report",
  ):
    done = run(installed, tmp_path, line)
    assert "Traceback" not in done.stderr
    assert "TPU" not in done.stderr.upper(), done.stderr
  assert (tmp_path / "world/report/report/index.html").exists()


def run_python(installed: Path, code: str) -> str:
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run(
    [installed / "python", "-c", code],
    env=environment,
    cwd=installed,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
