"""Command lines from typed options, and back."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import command_line
from safetydpo_jax.runtime.command_line import Repeated
from safetydpo_jax.runtime.hosts import Hosts


@dataclasses.dataclass(frozen=True)
class Options:
  """Draws what is asked for."""

  model: str
  """the base model"""
  out: Path
  """folder to write to"""
  lora: Repeated[tuple[str, ...]] = ()
  """may be repeated"""
  steps: int = 50
  """of the sampler"""
  guidance: float = 7.5
  """1 or less is none"""
  compare: bool = False
  """also without"""
  sampler: Literal["ddim", "pndm", "euler", "lms", "heun"] | None = None
  """the model's sampler
  (default: the checkpoint's)"""

  def __post_init__(self):
    if self.steps < 1:
      raise InputError(f"--steps is {self.steps}; expected 1 or more")


ABOUT = {"command": "draw", "example": "example:\n  python -m safetydpo_jax.draw"}
LEAST = ["--model", "toy", "--out", "x"]


def parse(*words):
  return command_line.parse(Options, [*LEAST, *words], **ABOUT)


def test_fields_are_flags_and_types_are_kept():
  options, hosts = parse("--lora", "a", "--lora=b:0.5", "--guidance", "-3", "--compare")
  expected = Options("toy", Path("x"), lora=("a", "b:0.5"), guidance=-3.0, compare=True)
  assert options == expected
  assert hosts == Hosts()


@pytest.mark.parametrize("value", ["-0.3,1.2", "-x", "-", "--no text, blurry"])
def test_a_value_may_begin_with_a_minus(value):
  options, _ = parse("--lora", value, "--compare")
  assert options == Options("toy", Path("x"), lora=(value,), compare=True)
  assert parse("--lora", f"{value}", "--lora", "b")[0].lora == (value, "b")


@pytest.mark.parametrize("words", [("--lora", "--stesp=30"), ("--compare", "-x")])
def test_an_option_is_not_taken_for_a_value(words):
  with pytest.raises(SystemExit):
    parse(*words)


def test_hosts_have_flags_of_their_own():
  _, hosts = parse("--num_processes", "2", "--process_id=1")
  assert hosts == Hosts(None, 2, 1)


def test_a_command_of_one_process_has_no_flags_of_hosts(capsys):
  assert command_line.parse_alone(Options, LEAST, **ABOUT) == Options("toy", Path("x"))
  with pytest.raises(SystemExit):
    command_line.parse_alone(Options, [*LEAST, "--process_id=1"], **ABOUT)
  assert "process_id" in capsys.readouterr().err


def test_a_value_out_of_range_is_one_line_from_a_line_and_from_python():
  for make in (lambda: parse("--steps=0"), lambda: Options("toy", Path("x"), steps=0)):
    with pytest.raises(InputError, match=r"--steps is 0; expected 1 or more"):
      make()


@pytest.mark.parametrize(
  "words", [["--step", "3"], ["more"], ["--sampler", "x"], ["--steps", "many"]]
)
def test_what_is_no_option_is_named_and_refused(words, capsys):
  with pytest.raises(SystemExit) as left:
    parse(*words)
  assert left.value.code == 2
  assert words[-1] in capsys.readouterr().err


def test_choices_are_listed_as_they_are_written_and_none_is_not_one(capsys):
  with pytest.raises(SystemExit):
    parse("--sampler", "None")
  shown = " ".join(capsys.readouterr().err.split())
  assert "('ddim', 'pndm', 'euler', 'lms', 'heun')" in shown.replace("│ ", "")


def test_overrides_are_let_through_and_nothing_else():
  lines = ["--config.steps=3", "--config.lora.targets=('to_q', 'to_k')"]
  options, _, rest = command_line.parse_with_overrides(
    Options, [*LEAST, lines[0], "--steps=2", lines[1]], **ABOUT
  )
  assert (options.steps, rest) == (2, lines)
  with pytest.raises(SystemExit):
    parse(*lines)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"lora": ("a", "b c:0.5")},
    {"compare": True, "guidance": -1.0, "sampler": "pndm"},
  ],
)
def test_a_written_line_gives_the_same_options(changes):
  options = Options("toy", Path("some folder"), **changes)
  start, module, *words = shlex.split(command_line.written("draw", options))[1:]
  assert (start, module) == ("-m", "safetydpo_jax.draw")
  assert command_line.parse(Options, words, **ABOUT)[0] == options


def test_help_shows_the_description_every_flag_and_the_example(capsys):
  with pytest.raises(SystemExit) as left:
    parse("--help")
  shown = capsys.readouterr().out
  assert left.value.code == 0
  for text in (
    "Draws what is asked for.",
    "python -m safetydpo_jax.draw",
    "--process_id",
  ):
    assert text in shown
  for field in dataclasses.fields(Options):
    assert f"--{field.name}" in shown


def test_help_says_each_default_once_and_joins_lines(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")
  with pytest.raises(SystemExit):
    parse("--help")
  shown = capsys.readouterr().out
  assert "the model's sampler (default: the checkpoint's) " in shown
  assert "of the sampler (default: 50)" in shown
  assert "None" not in shown
