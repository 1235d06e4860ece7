"""Command lines in the documentation: their options exist, and examples run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import documents
from tests.support.documents import FLAG, PAGES, ROOT, SITE

COMMANDS = documents.commands()
TOY = [name for name in COMMANDS if name.startswith("toyworld.")]
REAL = [name for name in COMMANDS if name not in TOY]
HOSTS = {"--coordinator_address", "--num_processes", "--process_id"}
# Pages where every option in the text is one of ours; others name launchers' too.
GUIDES = ("data", "merging", "generating", "evaluating", "attacking", "interchange")
# Examples under "Try it", in an order in which each finds its input.
TRY_IT = ("toyworld", "generate", "encode", "train", "merge", "export", "evaluate")
TRY_IT += ("prompts", "plan")
# Numbers that make an example quick: what it computes is tested elsewhere.
QUICK = {"--steps": "2", "--per_category": "4"}
QUICK_CONFIG = ("--config.steps=2", "--config.warmup_steps=0")


def in_blocks():
  """Every command line of ours in a page's shell blocks."""
  for page in PAGES:
    for block in documents.blocks(page):
      if block.language == "bash":
        for line in documents.lines(block.text):
          if line.command:
            name = str(page.relative_to(ROOT))
            yield pytest.param(line, id=f"{name}: {line.text.strip()[:60]}")


def in_text():
  """Every command line of ours in a page's running text; some have placeholders."""
  for page in PAGES:
    for code in documents.inline(page.read_text()):
      line = documents.read_line(code[max(code.find("python -m"), 0) :])
      if line and line.command and line.words:
        yield page, line


@pytest.fixture(scope="module")
def help_of():
  """{command: the flags that its --help lists}."""
  found = {}

  def flags(command, capsys, monkeypatch):
    if command not in found:
      monkeypatch.setenv("COLUMNS", "200")
      with pytest.raises(SystemExit) as left:
        documents.run(command, ["--help"])
      assert left.value.code == 0
      text = capsys.readouterr().out
      found[command] = set(FLAG.findall(text)) - {"--help"}
    return found[command]

  return flags


@pytest.mark.parametrize("line", list(in_blocks()))
def test_a_command_line_is_read_by_its_command(line, monkeypatch):
  monkeypatch.chdir(ROOT)  # configs/ is named from there
  documents.parse(line.command, line.words)


def test_the_check_of_command_lines_can_fail(monkeypatch):
  monkeypatch.chdir(ROOT)
  for text in (
    "python -m safetydpo_jax.generate --model toy --promts p.csv --out x",
    "safetydpo encode --model toy --pairs p --out x --dtype float8",
    "python -m safetydpo_jax.train --config hate:toy --workdir x --config.stepz=3",
  ):
    line = documents.read_line(text)
    with pytest.raises((SystemExit, Exception)) as caught:
      documents.parse(line.command, line.words)
    assert not isinstance(caught.value, (AssertionError, documents.Read))


def options_in(text):
  """The flags that tables of options list."""
  cells = re.findall(r"^\| (`--[^|]*)\|", text, re.MULTILINE)
  return set(FLAG.findall(" ".join(cells)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_lists_the_options_of_its_command(command, help_of, capsys, monkeypatch):
  """All of --help's, and no others, in the tables of the page or the section."""
  there = help_of(command, capsys, monkeypatch)
  if command in TOY:
    text = (SITE / "commands/toyworld.md").read_text()
    name = command.removeprefix("toyworld.")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.M))
    text = sections[name]
    if "Other options are the demo's" in text:
      there = there - options_in(sections["demo"]) | there & options_in(text)
  else:
    text = (SITE / f"commands/{command}.md").read_text()
  assert options_in(text) == there - HOSTS


def test_the_page_on_all_commands_lists_them():
  text = (SITE / "commands/index.md").read_text()
  assert [name for name in REAL if f"[`{name}`]({name}.md)" not in text] == []
  assert all(f"`{flag}`" in text for flag in HOSTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_several_processes_run_has_the_flags_for_it_and_no_other(
  command, help_of, capsys, monkeypatch
):
  text = (SITE / "commands/index.md").read_text()
  (sentence,) = re.findall(r"^(`.*) take these\.$", text, re.MULTILINE)
  expected = HOSTS if command in re.findall(r"`(\w+)`", sentence) else set()
  assert help_of(command, capsys, monkeypatch) & HOSTS == expected


def test_options_in_running_text_exist(help_of, capsys, monkeypatch):
  """Of the command that is named, or on guides of any command."""
  for page, line in in_text():
    flags = set(FLAG.findall(line.text)) - HOSTS
    unknown = flags - help_of(line.command, capsys, monkeypatch)
    assert not unknown, f"{page.name}: {line.text}"
  known = set().union(*(help_of(name, capsys, monkeypatch) for name in COMMANDS))
  for name in GUIDES:
    for code in documents.inline((SITE / f"{name}.md").read_text()):
      flags = FLAG.findall(code) if "XLA_FLAGS" not in code else []
      assert set(flags) <= known | HOSTS, f"{name}.md: {code}"


@pytest.mark.parametrize("command", REAL)
def test_a_command_has_an_example_that_runs(command):
  """Under "Try it" of its page."""
  page = SITE / f"commands/{command}.md"
  titles = [block.title for block in documents.blocks(page)]
  assert titles.count('title="Try it"') == 1
  assert command in TRY_IT


def quick(line):
  """The line's words with smaller numbers."""
  words = [
    QUICK.get(before, word) for before, word in zip([None, *line.words], line.words)
  ]
  if line.command == "toyworld.prompts" and "--per_category" not in words:
    words += ["--per_category", QUICK["--per_category"]]
  if line.command == "train":
    words += QUICK_CONFIG
  return words


def run_blocks(found, change):
  for block in found:
    for line in documents.lines(block.text):
      if line.command:
        documents.run(line.command, change(line))
      else:
        subprocess.run(line.text, shell=True, check=True)


def toy_pipeline():
  """The README's block that ends in a report of the toy world."""
  text = "world/report"
  (block,) = [b for b in documents.blocks(ROOT / "README.md") if text in b.text]
  return block


def test_the_toy_pipeline_runs(tmp_path, monkeypatch):
  """The README's, with smaller numbers."""
  monkeypatch.chdir(tmp_path)
  run_blocks([toy_pipeline()], quick)
  assert (tmp_path / "world/images/sheet.jpg").is_file()
  assert (tmp_path / "world/report/report/index.html").is_file()


@pytest.mark.slow
def test_the_toy_pipeline_runs_as_written(tmp_path):
  """In a shell, one process for each command, as a reader would run it."""
  script = "\n".join(
    shlex.join(["python", "-m", f"safetydpo_jax.{line.command}"])
    + " "
    + shlex.join(documents.presets(line.words))
    for line in documents.lines(toy_pipeline().text)
  )
  paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
  environment = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT)}
  environment.pop("XLA_FLAGS")  # the tests' eight devices
  result = subprocess.run(
    ["bash", "-ec", script],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  rates = re.findall(r"^(images|reference) +ip +([\d.]+)%", result.stdout, re.MULTILINE)
  shares = {name: float(share) for name, share in rates}
  assert shares["reference"] > 90
  assert shares["images"] < shares["reference"] / 2


def test_the_toy_pipeline_is_the_same_on_the_start_page():
  assert toy_pipeline() in documents.blocks(SITE / "index.md")


@pytest.mark.slow
def test_the_examples_of_the_command_pages_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pages = [SITE / f"commands/{name}.md" for name in TRY_IT]
  found = [b for page in pages for b in documents.blocks(page) if "Try it" in b.title]
  assert len(found) == len(TRY_IT)
  run_blocks(found, quick)
  for name in ("merged/expert.json", "kohya/export.json", "report/figures.json"):
    assert (tmp_path / "try" / name).is_file()
