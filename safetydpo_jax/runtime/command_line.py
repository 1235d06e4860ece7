"""A command's line, derived from its typed options, and the line that gives them.

Options are a frozen dataclass: a field is a flag of the same name, its docstring the
help, its type what is accepted. A value that is out of range is refused in the
dataclass's `__post_init__`, so a function that takes options can trust them, whether
they come from a command line or from Python.
"""

import dataclasses
import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import UseAppendAction as Repeated  # noqa: F401, for `--lora A --lora B`

from safetydpo_jax.runtime.hosts import Hosts

Options = TypeVar("Options")
PACKAGE = "safetydpo_jax"


def parse(
  options: type[Options],
  arguments: Sequence[str] | None,
  *,
  command: str,
  example: str,
) -> tuple[Options, Hosts]:
  """Reads a command line; `--help` and lines that make no options end the process.

  Args:
    options: the dataclass; its docstring is the command's description.
    arguments: the words after the command's name; None: the process's own.
    command: the module's name below the package, "generate" or "toyworld.demo".
    example: a command line that works as written, shown by `--help`.

  Returns:
    The options, and who the job's processes are.

  Raises:
    InputError: a value is out of range.
  """
  parsed, _ = _read(options, arguments, command, example, overrides=False)
  return parsed.options, parsed.hosts


def parse_alone(
  options: type[Options],
  arguments: Sequence[str] | None,
  *,
  command: str,
  example: str,
) -> Options:
  """As `parse`, for a command that one process runs: there are no flags of hosts."""
  parsed, _ = _read(
    options, arguments, command, example, overrides=False, several=False
  )
  return parsed.options


def parse_with_overrides(
  options: type[Options],
  arguments: Sequence[str] | None,
  *,
  command: str,
  example: str,
) -> tuple[Options, Hosts, list[str]]:
  """As `parse`, and the words `--config.NAME=VALUE` as they stand."""
  parsed, rest = _read(options, arguments, command, example, overrides=True)
  return parsed.options, parsed.hosts, rest


def parse_alone_with_overrides(
  options: type[Options],
  arguments: Sequence[str] | None,
  *,
  command: str,
  example: str,
) -> tuple[Options, list[str]]:
  """As `parse_with_overrides`, for a command that one process runs."""
  parsed, rest = _read(
    options, arguments, command, example, overrides=True, several=False
  )
  return parsed.options, rest


def _read(options, arguments, command, example, *, overrides, several=True):
  parts = {"options": options, "hosts": Hosts} if several else {"options": options}
  line = dataclasses.make_dataclass(
    "Line",
    [(name, Annotated[part, tyro.conf.arg(name="")]) for name, part in parts.items()],
  )
  words = sys.argv[1:] if arguments is None else list(map(str, arguments))
  rest = [word for word in words if overrides and word.startswith("--config.")]
  words = _join_values([word for word in words if word not in rest])
  parsed = tyro.cli(
    line,
    args=words,
    prog=f"python -m {PACKAGE}.{command}",
    description=f"{inspect.cleandoc(options.__doc__ or '')}\n\n{example.strip()}",
    use_underscores=True,
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  return parsed, rest


def _join_values(words: list[str]) -> list[str]:
  """`--weights -0.3,1.2` as `--weights=-0.3,1.2`; else the value would be an option.

  A value begins with a single minus, or it has a blank, which no option has. What
  begins with two is an option, perhaps a misspelt one, and remains one.
  """
  joined: list[str] = []
  for word in words:
    before = joined[-1] if joined else ""
    value = re.match(r"-(?!-|h$)", word) or (word.startswith("-") and " " in word)
    if value and re.fullmatch(r"--\w+", before):
      joined[-1] = f"{before}={word}"
    else:
      joined.append(word)
  return joined


def written(command: str, options: Any, *more: str) -> str:
  """The line a user would type for these options: those that are not the default.

  Args:
    command: the module's name below the package.
    options: an instance of a dataclass of options.
    more: words that follow, such as `--config.steps=90`.
  """
  words = []
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    if value == default or value is None:
      continue
    flag = f"--{field.name}"
    if value is True:
      words.append(flag)
    elif isinstance(value, (tuple, list)):
      words += [word for item in value for word in (flag, str(item))]
    else:
      words += [flag, str(value)]
  return shlex.join(["python", "-m", f"{PACKAGE}.{command}", *words, *more])
