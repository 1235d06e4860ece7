"""From `--config NAME[:VARIANT]` and `--config.x.y=VALUE` to a checked `RunConfig`.

NAME is a preset's, which works in any folder, or a Python file with a `get_config` that
returns a ConfigDict: one of the repository's `configs/`, or the user's own.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from safetydpo_jax import presets
from safetydpo_jax.errors import InputError
from safetydpo_jax.training.config import TYPE_NAMES, RunConfig, make_config, unknown

# What ml_collections raises for text that is not of the value's type.
_OVERRIDE_ERRORS = (flags.Error, LookupError, AttributeError, TypeError, ValueError)


def read_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
  """Reads and checks a config; no device is touched.

  Args:
    name: a preset or a file, with or without a variant: "hate", "hate:sdxl",
      "configs/hate.py:toy".
    overrides: "--config.NAME=VALUE", each for a value that the config has.

  Raises:
    InputError: there is no such config, or a value is unknown or wrong.
  """
  try:
    config = _load(name)
    for override in overrides:
      config = _override(config, override)
    return make_config(config.to_dict())
  except InputError as error:
    raise InputError(f"--config {name}: {error}") from error


def _load(name: str) -> ConfigDict:
  """What the preset or the file gives."""
  head, colon, variant = name.rpartition(":")
  if Path(name).is_file() or not colon:
    head, colon = name, ""
  arguments = [variant] if colon else []
  if head in presets.NAMES:
    return presets.get_config(head, *arguments)
  if not Path(head).is_file():
    raise InputError(
      f"there is no file {head} here; give a file's full path, or one of the presets "
      f"{', '.join(presets.NAMES)}"
    )
  try:
    module = runpy.run_path(head)
    if "get_config" not in module:
      raise InputError("it defines no get_config()")
    config = module["get_config"](*arguments)
  except InputError:
    raise
  except Exception as error:  # whatever the user's file raises
    raise InputError(f"{type(error).__name__}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise InputError(
      f"its get_config() returns a {type(config).__name__}; expected a ConfigDict, as "
      "presets.get_config() gives"
    )
  return config


def _override(config: ConfigDict, override: str) -> ConfigDict:
  """The config with one value as `--config.NAME=TEXT` says, read by its type."""
  name, _, text = override.removeprefix("--config.").partition("=")
  before = _find(config, name)
  line = ["train", override]
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
    values(line)
  except _OVERRIDE_ERRORS as error:
    expected = TYPE_NAMES.get(type(before), "its values one by one")
    raise InputError(f"config.{name} is {text!r}; expected {expected}") from error
  return values.config


def _find(config: ConfigDict, name: str) -> Any:
  """The value that config.NAME has now."""
  node, prefix = config, ""
  for part in name.split("."):
    known = list(node.keys()) if isinstance(node, ConfigDict) else []
    if part not in known:
      raise unknown(prefix, part, known)
    node, prefix = node[part], f"{prefix}{part}."
  return node
