"""What PEFT's settings say about the scale of a LoRA's product.

    s = alpha / r,   with use_rslora s = alpha / √r

alpha of a module is that of the first pattern in `alpha_pattern` that fits its name, as
in peft.utils.get_pattern_key: `re.match(rf"(.*\\.)?({pattern})$", name)`, else
`lora_alpha`. Ranks are read from the tensors, so `rank_pattern` is not needed.

The settings are in adapter_config.json of PEFT's folders, and with the prefix `unet.`
in the header (`lora_adapter_metadata`) of diffusers' files.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from safetydpo_jax.errors import InputError

# Initialisations that also change the base weights, which the factors do not hold.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq")


class Scaling(NamedTuple):
  """How a file's products are scaled; `alpha` None: alpha = r."""

  alpha: float | None = None
  patterns: tuple[tuple[re.Pattern, float], ...] = ()
  rslora: bool = False

  def __call__(self, module: str, rank: int) -> float:
    """s of `module` (PyTorch's dotted name)."""
    fitting = (alpha for pattern, alpha in self.patterns if pattern.match(module))
    alpha = next(fitting, rank if self.alpha is None else self.alpha)
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def parse_header(text: str, where: str) -> Scaling:
  """The settings of `lora_adapter_metadata`; `where` names the file in errors."""
  try:
    metadata = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: lora_adapter_metadata is not JSON: {error}") from error
  if not isinstance(metadata, dict):
    raise InputError(f"{where}: lora_adapter_metadata is not a JSON object")
  unet = {
    key.removeprefix("unet."): value
    for key, value in metadata.items()
    if key.startswith("unet.")
  }
  return parse(unet, where)


def parse(settings: Mapping[str, Any], where: str) -> Scaling:
  """The settings as a `Scaling`.

  Raises:
    InputError: they describe an adapter other than a plain LoRA, or are malformed.
  """
  kind = settings.get("peft_type", "LORA")
  if kind != "LORA":
    raise InputError(f"{where} is a {kind} adapter; only LoRA is supported")
  for name in ("use_dora", "lora_bias"):
    if settings.get(name):
      raise InputError(
        f"{where} was made with {name}, which is not supported; save it as a plain LoRA"
      )
  start = str(settings.get("init_lora_weights", "")).lower()
  if start.startswith(_MOVES_BASE):
    raise InputError(
      f"{where} started from {start}, which changes the base weights; save it as a "
      "plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
    )
  alpha = settings.get("lora_alpha")
  patterns = settings.get("alpha_pattern") or {}
  if not isinstance(patterns, dict):
    raise InputError(f"{where}: alpha_pattern is not a JSON object")
  return Scaling(
    None if alpha is None else _number(alpha, f"{where}: lora_alpha"),
    tuple(
      (_compile(key, where), _number(value, f"{where}: alpha_pattern of {key!r}"))
      for key, value in patterns.items()
    ),
    bool(settings.get("use_rslora")),
  )


def _number(value: object, what: str) -> float:
  """A finite number."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise InputError(f"{what} is {value!r}; expected a number")
  if not math.isfinite(value):
    raise InputError(f"{what} is {value!r}; expected a finite number")
  return float(value)


def _compile(key: str, where: str) -> re.Pattern:
  """A pattern of a file we did not write: it may not take exponential time."""
  quantifiers = len(re.findall(r"[*+{?]", key))
  if len(key) > 300 or quantifiers > 3 or re.search(r"\)[*+{?]|\(\?|\\\d", key):
    raise InputError(
      f"{where}: alpha_pattern {key[:60]!r} is not a simple pattern; save it with "
      "module names"
    )
  try:
    return re.compile(rf"(.*\.)?({key})$")
  except re.error as error:
    raise InputError(
      f"{where}: alpha_pattern {key!r} is not a pattern: {error}"
    ) from error
