"""A command's line, derived from its typed options, and the line that gives them.

Options are a frozen dataclass: a field is a flag of the same name, its docstring the
help, its type what is accepted. A value that is out of range is refused in the
dataclass's `__post_init__`, so a function that takes options can trust them, whether
they come from a command line or from Python.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import shlex
import sys
import textwrap
import typing
from collections import ChainMap
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
from tyro.conf import UseAppendAction as Repeated  # noqa: F401, for `--lora A --lora B`
from tyro.constructors import (
  MISSING,
  ConstructorRegistry,
  PrimitiveConstructorSpec,
  PrimitiveTypeInfo,
  StructConstructorSpec,
  StructFieldSpec,
  StructTypeInfo,
)

from safetydpo_jax.runtime.hosts import Hosts

Options = TypeVar("Options")
PACKAGE = "safetydpo_jax"
_LINE = "Line"  # the class of what a whole command line has


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
    _LINE,
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
    # The word None is text: a prompt or a folder may be called so.
    config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    registry=_RULES,
  )
  return parsed, rest


_RULES = ConstructorRegistry()


@_RULES.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
  """As tyro's own rule, but `--help` has no "(default: None)".

  What happens without such an option is in its help, where there is something to say.
  """
  if not dataclasses.is_dataclass(info.type) or info.type.__name__ == _LINE:
    return None
  hints = typing.get_type_hints(info.type, include_extras=True)
  fields = []
  for field in dataclasses.fields(info.type):
    kind, default = hints[field.name], field.default
    if default is None:
      kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="")]
    elif field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    elif default is dataclasses.MISSING:
      default = MISSING
    about = functools.partial(_help, info.type, field.name)
    fields.append(StructFieldSpec(field.name, kind, default, about))
  return StructConstructorSpec(info.type, tuple(fields))


@_RULES.primitive_rule
def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
  """Of "one of these texts, or None": the texts, in the order they are written in.

  tyro's own rule offers the word None too, and all in an order that varies.
  """
  names = [a for kind in get_args(info.type) for a in get_args(kind)]
  if names and set(get_args(info.type)) == {Literal[*names], NoneType}:
    return PrimitiveConstructorSpec(
      nargs=1,
      metavar=f"{{{','.join(names)}}}",
      instance_from_str=lambda words: words[0],
      is_instance=lambda value: value is None or value in names,
      str_from_instance=lambda value: [str(value)],
      choices=tuple(names),
    )
  return None


def _help(options: type, name: str) -> str | None:
  """The docstring below a field, on one line: tyro would keep its line breaks."""
  return ChainMap(*map(_docstrings, options.__mro__)).get(name)


@functools.cache
def _docstrings(options: type) -> dict[str, str]:
  """{field: the string below it} of one class, without its bases."""
  if not dataclasses.is_dataclass(options):
    return {}
  (tree,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
  assert isinstance(tree, ast.ClassDef)
  found = {}
  for field, text in itertools.pairwise(tree.body):
    match field, text:
      case (
        ast.AnnAssign(target=ast.Name(id=name)),
        ast.Expr(value=ast.Constant(value=str(words))),
      ):
        found[name] = " ".join(words.split())
  return found


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
