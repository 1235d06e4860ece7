"""Options of a merge: the table agrees with the dataclass, its help and the methods."""

import dataclasses
import typing
from pathlib import Path

import pytest

from safetydpo_jax import merge
from safetydpo_jax.errors import InputError
from safetydpo_jax.merging import baselines, comerge, options
from safetydpo_jax.merging.options import MergeOptions, with_defaults


def make(method, **more):
  if "co_merge" in method:
    more = {"calibration": "cache", **more}
  return MergeOptions("a,b", method, Path("out"), **more)


def test_the_table_names_every_method_and_only_options_that_exist():
  assert typing.get_args(options.Method) == ("co_merge", *options.OPTIONS)
  assert options.OPTIONS.keys() == {**baselines.METHODS, **comerge.METHODS}.keys()
  fields = {field.name for field in dataclasses.fields(MergeOptions)}
  read = {name for names in options.OPTIONS.values() for name in names}
  assert {*read, *options.DEFAULTS, *options.MEASURING} <= fields
  assert fields - read == {"experts", "method", "out", "model", "variant", "any_base"}


@pytest.mark.parametrize("method", typing.get_args(options.Method))
def test_a_method_gets_the_defaults_of_what_it_reads_and_nothing_else(method):
  filled = with_defaults(make(method))
  read = options.OPTIONS[filled.method]
  for name in {name for names in options.OPTIONS.values() for name in names}:
    if name != "calibration":
      wanted = options.DEFAULTS.get(name) if name in read else None
      assert getattr(filled, name) == wanted
  assert with_defaults(filled) == filled


def test_what_is_given_is_kept():
  given = {"pairs": 9, "seed": 3, "dtype": "bfloat16", "statistics": Path("s")}
  filled = with_defaults(make("co_merge", **given))
  assert {name: getattr(filled, name) for name in given} == given
  assert filled.method == comerge.DEFAULT


def test_the_help_shows_the_table_s_defaults(capsys):
  with pytest.raises(SystemExit):
    merge.main(["--help"])
  shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
  for name, value in options.DEFAULTS.items():
    text = shown.partition(f"--{name} ")[2].partition(" --")[0]
    assert f"default: {value})" in text, name
  assert f"co_merge is {comerge.DEFAULT}" in shown


@pytest.mark.parametrize(
  ("method", "more", "message"),
  [
    ("linear", {"seed": 1}, r"linear does not read --seed; .*dare_linear, dare_ties"),
    ("co_merge", {"weights": "1"}, r"co_merge_product does not read --weights"),
    ("co_merge_factor", {"calibration": None}, r"co_merge_factor needs --calibration"),
    ("ties", {"density": 1.5}, r"--density is 1.5"),
    ("dare_ties", {"seed": 2**32}, r"--seed is 4294967296"),
    ("linear", {"weights": "0,-0.0"}, r"--weights is '0,-0.0'"),
    ("svd", {"weights": "1,2,3"}, r"--weights is '1,2,3'.* 2 separated by commas"),
  ],
)
def test_options_from_python_are_checked_as_from_a_command_line(method, more, message):
  with pytest.raises(InputError, match=message):
    make(method, **more)
