"""Optional packages, and the extras of pyproject.toml that install them."""

import importlib
from types import ModuleType

from safetydpo_jax.errors import InputError


def require(module: str, extra: str) -> ModuleType:
  """Imports a module of an optional package.

  Args:
    module: its full name, "matplotlib" or "nudenet.nudenet".
    extra: the extra that installs the package, "report".

  Returns:
    The module.

  Raises:
    InputError: the package is not installed, or does not work here.
  """
  package = module.partition(".")[0]
  install = f'pip install "safetydpo-jax[{extra}]"'
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] == package:
      raise InputError(
        f"this needs {package}, which is not installed: {install}"
      ) from None
    raise InputError(
      f"{package} needs {error.name}, which is not installed: {install}"
    ) from error
  except ImportError as error:  # such as a shared library that is missing
    raise InputError(f"{package} cannot be imported ({error}): {install}") from error
