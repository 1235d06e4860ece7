"""Reading a checkpoint's `config.json`: defaults, and refusing what is not implemented.

A field that is not implemented can change the network without changing the name of any
weight, so ignoring it would give wrong images and no error. Hence each model declares
two tables: fields it reads, with diffusers' defaults, and fields it accepts only at the
listed values.
"""

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from flax.core import FrozenDict

from safetydpo_jax.errors import InputError

_KINDS = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_NULL = (("projection_dim", None),)  # of encoders that do not project
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
) -> SimpleNamespace:
  """Returns `config` over `defaults` as attributes.

  Args:
    config: the parsed `config.json`.
    what: names the model in errors, for example "UNet".
    defaults: fields the model reads, with the value an absent field has.
    accepted: fields the model does not read, with the values that change nothing.
    ignored: fields that have nothing to do with the network.

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
    if not (_fits(value, defaults[field]) or (field, value) in _NULL):
      raise InputError(
        f"{what} config: {field} = {as_json(value)} is of the wrong type; expected one "
        f"such as {as_json(defaults[field])}"
      )
  return SimpleNamespace(**read)


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
