"""Reading a checkpoint's `config.json`: defaults, and refusing what is not implemented.

A field that is not implemented can change the network without changing the name of any
weight, so ignoring it would give wrong images and no error. Hence each model declares
two tables: fields it reads, with diffusers' defaults, and fields it accepts only at the
listed values.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from flax.core import FrozenDict

from safetydpo_jax.errors import InputError

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
    InputError: a field has a value that is not implemented.
  """
  for field, value in config.items():
    if field in defaults or field in ignored or field.startswith("_"):
      continue
    values = accepted.get(field, (None, False))
    if value not in values:
      expected = " or ".join(repr(v) for v in values)
      raise InputError(
        f"{what} config: {field} = {value!r} is not supported, only {expected}; "
        "use a checkpoint of the Stable Diffusion 1, 2 or XL family"
      )
  return SimpleNamespace(
    **{**defaults, **{k: config[k] for k in defaults if k in config}}
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
