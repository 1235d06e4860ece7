"""What holds for the options of every command."""

import dataclasses
import importlib
import types
import typing
from pathlib import Path
from unittest import mock

import pytest
import tyro

from safetydpo_jax.errors import InputError
from tests.support import documents

# Values of required options that are not any text, and options that an option needs.
VALUES = {
  "kind": "pairs",
  "method": "co_merge",
  "concepts": "x.csv",
  "endpoint": "http://x/v1",
  "topology": "v5e:4x4",
}
NEEDS = {
  "prompts": {"out": "x.csv"},
  "encode": {"model": "x", "out": "x"},
  "merge": {"calibration": "x"},
  "merge --weights": {"method": "linear"},
  "merge --rank": {"method": "svd"},
  "merge --density": {"method": "ties"},
}


def options_of(command):
  """The dataclass that the command's line is read into."""
  with (
    mock.patch.object(tyro, "cli", side_effect=documents.Read) as read,
    pytest.raises(documents.Read),
  ):
    importlib.import_module(f"safetydpo_jax.{command}").main([])
  return typing.get_type_hints(read.call_args.args[0])["options"]


def fields_of(options):
  """(name, type, whether it is required) of each flag, also of dataclasses within."""
  hints = typing.get_type_hints(options)
  for field in dataclasses.fields(options):
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      yield from fields_of(hint)
    else:
      unset = {field.default, field.default_factory} == {dataclasses.MISSING}
      yield field.name, hint, unset


def required_of(command):
  return [name for name, _, required in fields_of(options_of(command)) if required]


def may_be_none():
  """Every option that has no value unless one is given: (command, name, types)."""
  for command in documents.commands():
    for name, hint, _ in fields_of(options_of(command)):
      if isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint):
        kinds = set(typing.get_args(hint)) - {type(None)}
        yield pytest.param(command, name, kinds, id=f"{command} --{name}")


def value_of(options, name):
  """The value of a flag, which may be of a dataclass within."""
  if hasattr(options, name):
    return getattr(options, name)
  within = [v for v in vars(options).values() if dataclasses.is_dataclass(v)]
  (value,) = [getattr(v, name) for v in within if hasattr(v, name)]
  return value


@pytest.mark.parametrize(("command", "name", "kinds"), list(may_be_none()))
def test_the_word_none_is_text_and_not_the_absence_of_a_value(command, name, kinds):
  """A prompt, a title or a file may be called so; what is not text refuses it."""
  given = {n: VALUES.get(n, "x") for n in required_of(command)}
  given |= NEEDS.get(f"{command} --{name}", NEEDS.get(command, {})) | {name: "None"}
  words = [f"--{option}={value}" for option, value in given.items()]
  if not kinds & {str, Path}:
    with pytest.raises(SystemExit):
      documents.read(command, words)
    return
  try:
    found = value_of(documents.read(command, words).options, name)
  except InputError as error:  # text that this option does not take
    found = str(error)
  assert found is not None
  assert "None" in str(found)
