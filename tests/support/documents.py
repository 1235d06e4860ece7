"""The documentation as tests see it: pages, their code, and the command lines in it."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import tyro

import safetydpo_jax
from safetydpo_jax.training import read_config

ROOT = Path(__file__).parents[2]
PACKAGE = Path(safetydpo_jax.__file__).parent
SITE = ROOT / "docs"
PAGES = [
  ROOT / "README.md",
  ROOT / "CONTRIBUTING.md",
  ROOT / "CHANGELOG.md",
  *sorted(SITE.rglob("*.md")),
]
_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_MODULE = re.compile(r"safetydpo_jax\.([\w.]+)")
# `--config.NAME` is a value of a run's config, not a flag.
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_]*(?![a-z0-9_.-])")


class Block(NamedTuple):
  """A fenced block: its language, the rest of the fence's line, and its text."""

  language: str
  title: str
  text: str


class Line(NamedTuple):
  """A command line: the command below the package, or "" for another's; its words."""

  command: str
  words: list[str]
  text: str


class Read(Exception):
  """A command has read its line; it would run now."""


def blocks(page: Path) -> list[Block]:
  """The page's fenced blocks, in order."""
  found = _BLOCK.findall(page.read_text())
  return [Block(language, title.strip(), text) for language, title, text in found]


def inline(text: str) -> list[str]:
  """What a text has in single backticks, outside of blocks; on one line each."""
  return [" ".join(code.split()) for code in _INLINE.findall(_BLOCK.sub("", text))]


def lines(text: str) -> list[Line]:
  """The command lines of a shell block, backslashes joined, comments dropped."""
  result = []
  for text_line in text.replace("\\\n", " ").splitlines():
    if line := read_line(text_line):
      result.append(line)
  return result


def read_line(text: str) -> Line | None:
  """One command line; None for an empty one."""
  try:
    words = shlex.split(text, comments=True)
  except ValueError:  # half of a shell construct that spans several lines
    return None
  if not words:
    return None
  if words[:2] == ["python", "-m"] and (found := _MODULE.fullmatch(words[2])):
    return Line(found[1], words[3:], text)
  if words[0] == "safetydpo" and len(words) > 1:
    return Line(words[1], words[2:], text)
  return Line("", words, text)


def commands() -> list[str]:
  """The commands of the package: modules that run as `python -m`."""
  modules = [*PACKAGE.glob("*.py"), *PACKAGE.glob("toyworld/*.py")]
  return sorted(
    ".".join(module.relative_to(PACKAGE).with_suffix("").parts)
    for module in modules
    if "run_command(main)" in module.read_text() and module.stem != "__main__"
  )


def read(command: str, words: list[str]) -> Any:
  """What the command's own options make of its words; nothing is run.

  Returns:
    The attributes `options` and, if the command takes them, `hosts`.

  Raises:
    SystemExit: an option is unknown, missing or of the wrong type.
    InputError: a value is out of range.
  """
  module = importlib.import_module(f"safetydpo_jax.{command}")
  cli = tyro.cli

  def stop(*args: Any, **keywords: Any) -> None:
    raise Read(cli(*args, **keywords))

  with mock.patch.object(tyro, "cli", stop):
    try:
      module.main(words)
    except Read as done:
      return done.args[0]
  raise AssertionError(f"{command} does not read its line with tyro.cli")


def parse(command: str, words: list[str]) -> None:
  """Reads a line as the command does, with the config that it names; runs nothing.

  Raises:
    SystemExit: an option is unknown, missing or of the wrong type.
    InputError: a value is out of range, or the config has no such value.
  """
  read(command, words)
  if command in ("train", "plan"):
    name = words[words.index("--config") + 1]
    overrides = [word for word in words if word.startswith("--config.")]
    read_config.read_config(name, overrides)


def run(command: str, words: list[str]) -> None:
  """Runs a command in this process."""
  importlib.import_module(f"safetydpo_jax.{command}").main(words)
