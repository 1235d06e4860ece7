"""`safetydpo COMMAND`: the list, the commands, and words that name none."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import safetydpo_jax
from safetydpo_jax import __main__ as console
from safetydpo_jax.errors import InputError

PACKAGE = Path(safetydpo_jax.__file__).parent


def test_every_command_is_listed():
  found = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if "\n  run_command(main)\n" in file.read_text() and file.stem != "__main__"
  }
  assert found == set(console.COMMANDS)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_has_one_line_for_each_command(words, capsys):
  console.main(words)
  lines = capsys.readouterr().out.splitlines()
  for name, about in console.COMMANDS.items():
    assert [line for line in lines if re.fullmatch(f"  {name} +{about}", line)]
  assert max(map(len, lines)) <= 80


def test_help_does_not_load_jax():
  code = (
    "import sys; from safetydpo_jax import __main__; __main__.main(['--help']); "
    "print(sorted({'jax', 'numpy', 'tyro', 'tensorflow_datasets'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout.splitlines()[-1] == "[]"


# Each takes from a tenth of a second to seconds, and no `--help` needs it.
HEAVY = ("huggingface_hub", "matplotlib", "pandas", "scipy", "torch", "transformers")


def test_no_command_loads_more_than_its_options_need():
  code = f"""
import importlib, sys
for command in {list(console.COMMANDS)}:
  importlib.import_module(f"safetydpo_jax.{{command}}")
  print(command, *sorted({set(HEAVY)} & set(sys.modules)))
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.splitlines() == list(console.COMMANDS)


def test_version(capsys):
  console.main(["--version"])
  assert capsys.readouterr().out == f"safetydpo {safetydpo_jax.__version__}\n"


@pytest.mark.parametrize(
  ("word", "module"),
  [("demo", "toyworld.demo"), ("toyworld.demo", "toyworld.demo"), ("plan", "plan")],
)
def test_a_command_gets_the_words_after_its_name(word, module, monkeypatch):
  called = []

  def load(name):
    module = type(sys)(name)
    module.main = lambda words: called.append((name, words))
    return module

  monkeypatch.setattr(console.importlib, "import_module", load)
  console.main([word, "--out", "demo"])
  assert called == [(f"safetydpo_jax.{module}", ["--out", "demo"])]


@pytest.mark.parametrize(
  ("word", "near"),
  [
    ("genrate", "generate"),
    ("evalutae", "evaluate"),
    ("dem", "demo"),
    ("study", "toyworld.study"),
    ("toyworld.atack", "toyworld.attack"),
  ],
)
def test_an_unknown_command_names_the_nearest(word, near):
  with pytest.raises(InputError, match=rf"{word}'.*\b{re.escape(near)},.*--help"):
    console.main([word])


def test_an_option_without_a_command_is_refused():
  with pytest.raises(InputError, match="safetydpo COMMAND --out"):
    console.main(["--out", "x"])


@pytest.mark.parametrize("words", [["nothing"], ["toyworld.report", "--folder", "x"]])
def test_a_wrong_line_is_one_line_on_stderr(words):
  done = subprocess.run(
    [sys.executable, "-m", "safetydpo_jax", *words], capture_output=True, text=True
  )
  assert done.returncode == 1
  assert re.fullmatch(r"error: .*\n", done.stderr)
