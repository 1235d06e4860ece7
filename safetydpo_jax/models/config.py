"""Reading a checkpoint's `config.json`: defaults, and refusing what is not implemented.

A field that is not implemented can change the network without changing the name of any
weight, so ignoring it would give wrong images and no error. Hence each model declares
two tables: fields it reads, with diffusers' defaults, and fields it accepts only at the
listed values.
"""

import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from flax.core import FrozenDict

from safetydpo_jax.errors import InputError

_KINDS = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_NULL = (("projection_dim", None),)  # of encoders that do not project
# Far beyond every published network: a larger one takes forever to build.
_LARGEST, _MOST_LAYERS, _MOST_LEVELS = 10**6, 100, 10
# Fields that may be 0. Of others nothing would be left, or they are divided by.
_MAYBE_ZERO = ("eos_token_id", "freq_shift", "transformer_layers_per_block")
# What diffusers' EMAModel, now and in older versions, writes into the config of a model
# whose weights are a moving average: how they were averaged, nothing about the network.
TRAINING = (
  "collected_params",
  "decay",
  "inv_gamma",
  "max_value",
  "min_decay",
  "min_value",
  "optimization_step",
  "power",
  "update_after_step",
  "use_ema_warmup",
)


def freeze(value: Any) -> Any:
  """Makes parsed JSON hashable: dicts become `FrozenDict`, lists become tuples."""
  if isinstance(value, Mapping):
    return FrozenDict({key: freeze(item) for key, item in value.items()})
  if isinstance(value, (list, tuple)):
    return tuple(freeze(item) for item in value)
  return value


def settle(
  config: Mapping[str, Any],
  what: str,
  defaults: Mapping[str, Any],
  accepted: Mapping[str, tuple],
  ignored: tuple[str, ...] = (),
  by_level: tuple[str, ...] = (),
) -> SimpleNamespace:
  """Returns `config` over `defaults` as attributes.

  Args:
    config: the parsed `config.json`.
    what: names the model in errors, for example "UNet".
    defaults: fields the model reads, with the value an absent field has.
    accepted: fields the model does not read, with the values that change nothing.
    ignored: fields that have nothing to do with the network.
    by_level: fields that may have a list, an entry for each level. Those whose default
      is a list must have one.

  Raises:
    InputError: a field has a value that is not implemented, or of another type.
  """
  for field, value in config.items():
    if field in defaults or field in ignored or field.startswith("_"):
      continue
    values = accepted.get(field, (None, False))
    if value not in values:
      known = "is not supported" if field in accepted else "is not known here"
      raise InputError(
        f"{what} config: {field} = {as_json(value)} {known}, only "
        f"{' or '.join(map(as_json, values))}; use a checkpoint of the Stable "
        "Diffusion 1, 2 or XL family"
      )
  read = {field: config.get(field, default) for field, default in defaults.items()}
  for field, value in read.items():
    default = defaults[field]
    listed = isinstance(value, list | tuple)
    right = listed or value is None if isinstance(default, tuple) else not listed
    if not (
      (_fits(value, default) and (right or (listed and field in by_level)))
      or (field, value) in _NULL
    ):
      raise InputError(
        f"{what} config: {field} = {as_json(value)} is of the wrong type; expected one "
        f"such as {as_json(defaults[field])}"
      )
    _check_sizes(value, field, what)
  return SimpleNamespace(**read)


def _check_sizes(value: Any, field: str, what: str) -> None:
  """Refuses numbers, and lists, that cannot be sizes of a network."""
  most = _MOST_LAYERS if "layers" in field else _LARGEST
  zero = field.removeprefix("reverse_") in _MAYBE_ZERO
  right = all(0 < n <= most or (zero and n == 0) for n in _numbers(value))
  if not right or (isinstance(value, list | tuple) and len(value) > _MOST_LEVELS):
    raise InputError(
      f"{what} config: {field} = {as_json(value)} is not a valid size; expected "
      f"{'from 0' if zero else 'above 0'} to {most:,}, at most {_MOST_LEVELS} levels"
    )


def _numbers(value: Any) -> Iterator[float]:
  """The numbers in a value and in its lists."""
  if isinstance(value, list | tuple):
    for item in value:
      yield from _numbers(item)
  elif type(value) in (int, float):
    yield value


def as_json(value: Any) -> str:
  """A value as its file spells it: null and true, not None and True."""
  return json.dumps(value, default=dict)


def _fits(value: Any, default: Any) -> bool:
  """Whether a field has its default's type, or is a list of them, one per level."""
  first = default[0] if isinstance(default, tuple) else default
  if isinstance(value, (list, tuple)):
    return bool(value) and all(_fits(item, first) for item in value)
  if value is None:  # no block, no switch
    return first is None or isinstance(first, str | bool)
  return default is None or type(value) in _KINDS[type(first)]


def check_groups(c: SimpleNamespace, what: str) -> None:
  """Refuses features that cannot be split into groups for the norms."""
  for features in c.block_out_channels:
    if features % c.norm_num_groups:
      raise InputError(
        f"{what} config: block_out_channels = {as_json(c.block_out_channels)} cannot "
        f"be split into norm_num_groups = {c.norm_num_groups}"
      )


def per_level(value: Any, levels: int, field: str, what: str = "UNet") -> tuple:
  """Spreads a scalar over the levels; a list must have one entry for each level."""
  if not isinstance(value, (list, tuple)):
    return (value,) * levels
  if len(value) != levels:
    raise InputError(
      f"{what} config: {field} = {value!r} has {len(value)} entries for {levels} levels"
    )
  return tuple(value)


def choose(table: Mapping[Any, Any], value: Any, what: str, field: str) -> Any:
  """Looks `value` up in a table of what is implemented."""
  if value not in table:
    raise InputError(
      f"{what} config: {field} = {value!r} is not supported, "
      f"only {' or '.join(repr(key) for key in table)}"
    )
  return table[value]
