"""Packages that only a few commands need, installed as extras of this one."""

import importlib
from types import ModuleType

from safetydpo_jax.errors import InputError


def require(module: str, extra: str) -> ModuleType:
  """Imports a module of an optional package.

  Args:
    module: its full name, as in `import`.
    extra: the extra of safetydpo-jax that installs it.

  Raises:
    InputError: the package is not installed.
  """
  package = module.partition(".")[0]
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != package:
      raise  # installed, but something that it imports is not
    raise InputError(
      f"{package} is not installed; this command needs it: "
      f'pip install "safetydpo-jax[{extra}]"'
    ) from error
