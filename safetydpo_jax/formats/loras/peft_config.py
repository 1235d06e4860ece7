"""What PEFT's settings say about the scale of a LoRA's product.

    s = alpha / r,   with use_rslora s = alpha / √r

alpha of a module is that of the first pattern in `alpha_pattern` that fits its name, as
in peft.utils.get_pattern_key: `re.match(rf"(.*\\.)?({pattern})$", name)`, else
`lora_alpha`; LoHa and LoKr call it `alpha`. Ranks are read from the tensors; LoKr of
two whole matrices has none there, and its r is that of `rank_pattern`, or `r`.

The settings are in adapter_config.json of PEFT's folders, and with the prefix `unet.`
in the header (`lora_adapter_metadata`) of diffusers' files.
"""

import json
import math
import re
import sys
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
  rank: float | None = None
  rank_patterns: tuple[tuple[re.Pattern, float], ...] = ()
  dora: bool = False

  def __call__(self, module: str, rank: float | None) -> float:
    """s of `module` (PyTorch's dotted name) with factors of `rank`; None: without."""
    if rank is None:
      rank = _first(self.rank_patterns, module, self.rank)
    if rank is None:
      return 1.0
    alpha = _first(self.patterns, module, self.alpha)
    alpha = rank if alpha is None else alpha
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def _first(
  patterns: tuple[tuple[re.Pattern, float], ...], module: str, otherwise: float | None
) -> float | None:
  """The number of the first pattern that fits a module's name."""
  return next((n for pattern, n in patterns if pattern.match(module)), otherwise)


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
  if kind not in ("LORA", "LOHA", "LOKR"):
    raise InputError(
      f"{where} is a {kind} adapter; only LORA, LOHA and LOKR are supported"
    )
  if settings.get("lora_bias"):
    raise InputError(
      f"{where} was made with lora_bias, which is not supported; save it without"
    )
  start = str(settings.get("init_lora_weights", "")).lower()
  if start.startswith(_MOVES_BASE):
    raise InputError(
      f"{where} was initialised with {start}, which changes the base weights; save it "
      "as a plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
    )
  scaling = Scaling(
    _optional(settings, "lora_alpha" if kind == "LORA" else "alpha", where),
    _patterns(settings, "alpha_pattern", where),
    _flag(settings, "use_rslora", where),
    dora=_flag(settings, "use_dora", where),
  )
  if kind != "LOKR":
    return scaling
  ranks = _patterns(settings, "rank_pattern", where)
  rank = _optional(settings, "r", where)
  if any(number is not None and number < 1 for number in (rank, *dict(ranks).values())):
    raise InputError(f"{where}: r or rank_pattern has a rank below 1")
  return scaling._replace(rank=rank, rank_patterns=ranks)


def _flag(settings: Mapping[str, Any], name: str, where: str) -> bool:
  """A switch of the settings, false if it is not there."""
  value = settings.get(name)
  if value not in (None, False, True):
    raise InputError(f"{where}: {name} is {value!r}; expected true or false")
  return bool(value)


def _optional(settings: Mapping[str, Any], name: str, where: str) -> float | None:
  """A number of the settings, None if it is not there."""
  value = settings.get(name)
  return None if value is None else _number(value, f"{where}: {name}")


def _patterns(
  settings: Mapping[str, Any], name: str, where: str
) -> tuple[tuple[re.Pattern, float], ...]:
  """alpha_pattern or rank_pattern of the settings."""
  patterns = settings.get(name) or {}
  if not isinstance(patterns, dict):
    raise InputError(f"{where}: {name} is not a JSON object")
  return tuple(
    (_compile(key, name, where), _number(value, f"{where}: {name} of {key!r}"))
    for key, value in patterns.items()
  )


def _number(value: object, what: str) -> float:
  """A finite number."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise InputError(f"{what} is {value!r}; expected a number")
  if not abs(value) <= sys.float_info.max:  # JSON's integers have no largest
    raise InputError(f"{what} is {value!r}; expected a finite number")
  return float(value)


def _compile(key: str, name: str, where: str) -> re.Pattern:
  """A pattern of a file we did not write: it may not take exponential time."""
  quantifiers = len(re.findall(r"[*+{?]", key))
  if len(key) > 300 or quantifiers > 3 or re.search(r"\)[*+{?]|\(\?|\\\d", key):
    raise InputError(
      f"{where}: {name} {key[:60]!r} is not a simple pattern; save it with module names"
    )
  try:
    return re.compile(rf"(.*\.)?({key})$")
  except (re.error, OverflowError) as error:
    raise InputError(f"{where}: {name} {key!r} is not a pattern: {error}") from error
