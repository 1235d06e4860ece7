"""A training run's config: frozen, typed, and checked whole before a model is read.

Every value is checked when a `RunConfig` is made, also by `dataclasses.replace`: its
type, its range, and that a name is a known one. So whatever takes a `RunConfig` can
trust it. What the values mean, and why they are what they are, is in `presets.py`.
Checks that need the model, the data or the devices are made where those are known.
"""

import dataclasses
import difflib
import math
import numbers
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, NamedTuple

from safetydpo_jax import dpo, lora
from safetydpo_jax.data import categories
from safetydpo_jax.data.cache.batches import FLIPS
from safetydpo_jax.data.cache.records import MIXTURES
from safetydpo_jax.errors import InputError
from safetydpo_jax.lora import Pattern
from safetydpo_jax.models.attention import KERNELS
from safetydpo_jax.models.blocks import REMAT

OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("bfloat16", "float32")

TYPE_NAMES: dict[type, str] = {
  int: "a whole number",
  float: "a finite number",
  bool: "True or False",
  str: "text",
  tuple: "a tuple, as in ('to_q', 'to_k') or (('conv1', 8),)",
}


class Rule(NamedTuple):
  """Which values of a type are accepted, and how an error says it."""

  fits: Callable[[Any], bool]
  expected: str


def _one_of(names: Collection[str]) -> Rule:
  return Rule(lambda name: name in names, " or ".join(names))


Count = Annotated[int, Rule(lambda n: n >= 1, "1 or more")]
Seed = Annotated[int, Rule(lambda n: 0 <= n < 2**32, "0 to 2^32 - 1")]
Positive = Annotated[float, Rule(lambda x: x > 0, "above 0")]
NotNegative = Annotated[float, Rule(lambda x: x >= 0, "0 or more")]
Share = Annotated[float, Rule(lambda x: 0 <= x < 1, "0 or more, below 1")]
Probability = Annotated[float, Rule(lambda x: 0 <= x <= 1, "0 to 1")]


@dataclasses.dataclass(frozen=True)
class AdamConfig:
  b1: Share
  b2: Share
  # At b = 0 the gradient of a is 0: without eps, Adam's first update of it is 0 / 0.
  eps: Positive

  def __post_init__(self):
    _check_fields(self, "adam.")


@dataclasses.dataclass(frozen=True)
class DpoConfig:
  loss: Annotated[str, _one_of(dpo.LOSSES)]
  beta: NotNegative

  def __post_init__(self):
    _check_fields(self, "dpo.")
    if "beta" in dpo.LOSSES[self.loss].reads and not self.beta:
      raise _wrong("dpo.beta", self.beta, "above 0")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  rank: Count
  alpha: Positive
  targets: tuple[str, ...]
  rank_pattern: Pattern
  alpha_pattern: Pattern
  dropout: Share
  init: str
  seed: Seed

  def __post_init__(self):
    _check_fields(self, "lora.")
    if not self.targets:
      usual = ", ".join(lora.ATTENTION_TARGETS)
      raise InputError(f"config.lora.targets is empty; the usual targets are {usual}")
    for layer, rank in self.rank_pattern:
      if rank != int(rank) or rank < 1:
        raise InputError(
          f"config.lora.rank_pattern has rank {rank} for {layer!r}; expected a whole "
          "number, 1 or more"
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: Annotated[int, Rule(lambda n: n == -1 or n >= 1, "1 or more, or -1")]
  fsdp: Count

  def __post_init__(self):
    _check_fields(self, "mesh.")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """All that decides a run, besides where it writes."""

  model: Annotated[str, Rule(bool, "a diffusers directory, a hub id or a name")]
  variant: str
  cache: str  # may be empty where no pairs are read
  category: str
  mixture: Annotated[str, _one_of(MIXTURES)]
  holdout: Share
  caption_dropout: Probability
  flip: Annotated[str, _one_of(FLIPS)]

  steps: Count
  batch_size: Count
  accumulation: Count
  learning_rate: NotNegative
  scale_lr: bool
  warmup_steps: Annotated[int, Rule(lambda n: n >= 0, "0 or more")]
  schedule: Annotated[str, _one_of(SCHEDULES)]
  optimizer: Annotated[str, _one_of(OPTIMIZERS)]
  adam: AdamConfig
  weight_decay: NotNegative
  clip_norm: Positive

  dpo: DpoConfig
  lora: LoraConfig

  seed: Seed
  log_every: Count
  checkpoint_every: Count
  resume: bool

  mesh: MeshConfig
  dtype: Annotated[str, _one_of(DTYPES)]
  remat: Annotated[str, _one_of(REMAT)]
  attention: Annotated[str, _one_of(KERNELS)]

  def __post_init__(self):
    _check_fields(self, "")
    try:
      categories.selection(self.category)
    except InputError as error:
      raise InputError(f"config.category: {error}") from error

  def to_dict(self) -> dict[str, Any]:
    """The values as nested dicts in alphabetical order, as expert.json has them."""

    def ordered(values):
      return {
        name: ordered(value) if isinstance(value, dict) else value
        for name, value in sorted(values.items())
      }

    return ordered(dataclasses.asdict(self))


def make_config(values: Mapping[str, Any]) -> RunConfig:
  """A run's config from nested dicts of all its values.

  Raises:
    InputError: a value is unknown, missing, of the wrong type or out of range.
  """
  return _make(RunConfig, values, "")


def check_devices(config: RunConfig, devices: int) -> None:
  """Raises `InputError` unless the batch can be split over this many devices."""
  if config.batch_size % devices:
    raise InputError(
      f"config.batch_size is {config.batch_size} pairs; expected a multiple of the "
      f"{devices} devices"
    )
  rows = config.batch_size // devices
  if rows % config.accumulation:
    raise InputError(
      f"config.accumulation is {config.accumulation}, each device has {rows} of the "
      f"{config.batch_size} pairs; set config.accumulation="
      f"{math.gcd(rows, config.accumulation)}"
    )


def _make(kind: Any, values: Any, prefix: str) -> Any:
  if not isinstance(values, Mapping):
    raise _wrong(prefix.rstrip("."), values, "a ConfigDict")
  hints = typing.get_type_hints(kind)
  for name in sorted(values.keys() - hints.keys(), key=str):
    raise unknown(prefix, name, hints)
  for name in sorted(hints.keys() - values.keys()):
    raise InputError(
      f"config.{prefix}{name} is missing; start from presets.get_config()"
    )
  return kind(
    **{
      name: _make(hint, values[name], f"{prefix}{name}.")
      if dataclasses.is_dataclass(hint)
      else values[name]
      for name, hint in hints.items()
    }
  )


def _check_fields(config: Any, prefix: str) -> None:
  """Checks each field by its annotation, and gives it exactly that type."""
  for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
    kind, *rules = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    value = _typed(f"{prefix}{name}", getattr(config, name), kind)
    for rule in rules:
      if not rule.fits(value):
        raise _wrong(f"{prefix}{name}", value, rule.expected)
    object.__setattr__(config, name, value)  # the dataclasses are frozen


def _typed(name: str, value: Any, kind: Any) -> Any:
  if kind == tuple[str, ...]:
    if isinstance(value, (tuple, list)) and all(isinstance(x, str) for x in value):
      return tuple(value)
    raise _wrong(name, value, "a tuple of layers, as in ('to_q', 'to_k')")
  if kind == Pattern:
    if isinstance(value, (tuple, list)):
      lora.check_pattern(value, f"config.{name}")
      return tuple(tuple(entry) for entry in value)
    raise _wrong(name, value, "pairs (layer, number), as in (('conv1', 8),)")
  if dataclasses.is_dataclass(kind):
    return value
  # numpy's numbers are numbers too; True is an int to Python.
  accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
  fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
  if not fits or (kind is float and not math.isfinite(value)):
    raise _wrong(name, value, TYPE_NAMES[kind])
  return kind(value)


def unknown(prefix: str, name: str, known: Collection[str]) -> InputError:
  """The error for `config.PREFIX` + `name`, which is not one of `known`."""
  close = difflib.get_close_matches(str(name), known, n=1)
  hint = f"did you mean config.{prefix}{close[0]}?" if close else "remove it"
  return InputError(f"config.{prefix}{name} is unknown; {hint}")


def _wrong(name: str, value: Any, expected: str) -> InputError:
  return InputError(f"config.{name} is {value!r}; expected {expected}")
