"""What a merge may be asked for: its options, and which method reads which of them.

The table is data: a method reads the options that `OPTIONS` lists for it, besides the
experts, the base model and its variant, and is called with those outside `MEASURING`.
`DEFAULTS` holds what an option is when it is not given. An option that the method does
not read is refused rather than ignored.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from safetydpo_jax.errors import InputError
from safetydpo_jax.merging import baselines, comerge

Method = Literal[
  "co_merge",
  "linear",
  "svd",
  "ties",
  "dare_linear",
  "dare_ties",
  "magnitude",
  "co_merge_factor",
  "co_merge_product",
]
STATISTICS = "statistics"  # the folder in --out, unless --statistics names another

# What the measuring reads, not the merge; expert.json has it under "calibration".
MEASURING = (
  *("calibration", "statistics", "pairs", "timesteps", "dtype"),
  *("batch_size", "experts_at_once"),
)
OPTIONS: dict[str, tuple[str, ...]] = {
  "linear": ("weights",),
  "svd": ("weights", "rank"),
  "ties": ("weights", "rank", "density"),
  "dare_linear": ("weights", "rank", "density", "seed"),
  "dare_ties": ("weights", "rank", "density", "seed"),
  "magnitude": ("weights", "rank", "density"),
  "co_merge_factor": (*MEASURING, "seed"),
  "co_merge_product": (*MEASURING, "rank", "seed"),
}
DEFAULTS: dict[str, Any] = {
  "density": baselines.DENSITY,
  "seed": 0,
  "pairs": 4,
  "dtype": "float32",
  "batch_size": 2,
  "experts_at_once": 1,
}


@dataclasses.dataclass(frozen=True)
class MergeOptions:
  """Merges LoRA experts of one base model into a single LoRA."""

  # None: not given. `with_defaults` fills in what the method reads.

  experts: str
  """run directories, merged directories, LoRA files or hub ids: L,L,…"""
  method: Method
  """how to merge; co_merge is co_merge_product"""
  out: Path
  """folder to write to"""
  model: str | None = None
  """the base model (default: the one that expert.json names; needed if all experts are
  LoRA files)"""
  variant: str | None = None
  """variant of the model's files, such as fp16"""
  any_base: bool = False
  """take experts of other base models, such as the one MODEL is a fine-tune of"""
  weights: str | None = None
  """W or W,W,…: one number for all experts, or one for each (default: 1/N for N
  experts, their mean; 1 gives their sum, as diffusers' set_adapters does)"""
  rank: int | None = None
  """rank of the result (default: the experts' largest; co_merge_product: exact, the sum
  of their ranks)"""
  density: float | None = None
  """share of entries to keep (default: 0.5)"""
  seed: int | None = None
  """seed of what DARE drops and of what Co-Merge samples (default: 0)"""
  calibration: str | None = None
  """Co-Merge: the cache that `encode` wrote"""
  pairs: int | None = None
  """Co-Merge: calibration pairs of each category (default: 4)"""
  timesteps: str | None = None
  """Co-Merge: T,T,… to which each pair is noised (default: four, evenly spaced)"""
  statistics: Path | None = None
  """Co-Merge: folder of the activations; experts that it holds are not measured again
  (default: OUT/statistics)"""
  batch_size: int | None = None
  """Co-Merge: pairs per device (default: 2)"""
  experts_at_once: int | None = None
  """Co-Merge: experts that share a UNet call (default: 1)"""
  dtype: Literal["float32", "bfloat16"] | None = None
  """Co-Merge: number type of the UNet's computations (default: float32)"""

  def __post_init__(self):
    read = OPTIONS[method_of(self)]
    for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
      if getattr(self, name) is not None and name not in read:
        others = ", ".join(method for method, names in OPTIONS.items() if name in names)
        raise InputError(
          f"--method {method_of(self)} does not read --{name}; leave it out, or use "
          f"one of {others}"
        )
    for name in ("rank", "pairs", "batch_size", "experts_at_once"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise InputError(f"--{name} is {getattr(self, name)}; expected 1 or more")
    if self.density is not None and not 0 < self.density <= 1:
      raise InputError(f"--density is {self.density}; expected above 0, up to 1")
    if self.seed is not None and not 0 <= self.seed < 2**32:
      raise InputError(f"--seed is {self.seed}; expected 0 to 2^32 - 1")
    if "calibration" in read and not self.calibration:
      raise InputError(
        f"--method {method_of(self)} needs --calibration, a folder that `encode` wrote"
      )
    if "weights" in read:
      parse_weights(self.weights, len(self.names))

  @property
  def names(self) -> tuple[str, ...]:
    """The experts, one by one."""
    return tuple(self.experts.split(","))


def method_of(options: MergeOptions) -> Method:
  """The method's name in `OPTIONS`: `co_merge` is one of two readings."""
  return comerge.DEFAULT if options.method == "co_merge" else options.method


def with_defaults(options: MergeOptions) -> MergeOptions:
  """The options with `co_merge` resolved and `DEFAULTS` in place of None.

  Options that the method does not read stay None.
  """
  method = method_of(options)
  given: dict[str, Any] = {name: getattr(options, name) for name in OPTIONS[method]}
  filled: dict[str, Any] = {
    name: DEFAULTS.get(name) if value is None else value
    for name, value in given.items()
  }
  return dataclasses.replace(options, method=method, **filled)


@dataclasses.dataclass(frozen=True)
class Measuring:
  """What Co-Merge measures, and how: options of `MEASURING` and the seed, filled in."""

  calibration: str
  statistics: Path
  pairs: int
  timesteps: str | None
  dtype: str
  batch_size: int
  experts_at_once: int
  seed: int


def measuring_of(options: MergeOptions) -> Measuring:
  """That part of `with_defaults`' options, of a method that measures."""
  names = [field.name for field in dataclasses.fields(Measuring)]
  values: dict[str, Any] = {name: getattr(options, name) for name in names}
  values["statistics"] = options.statistics or options.out / STATISTICS
  return Measuring(**values)


def parse_weights(text: str | None, count: int) -> list[float]:
  """`0.5` or `0.2,0.8` → one number for each of `count` experts; None: 1 / count.

  Raises:
    InputError: anything else.
  """
  if text is None:
    return [1 / count] * count
  try:
    numbers = [float(number) for number in text.split(",")]
  except ValueError:
    numbers = [math.nan]
  if not all(map(math.isfinite, numbers)) or len(numbers) not in (1, count):
    raise InputError(
      f"--weights is {text!r}; expected one finite number, or {count} separated by "
      "commas, one for each expert"
    )
  if not any(numbers):
    raise InputError(
      f"--weights is {text!r}, which leaves nothing of any expert; expected a weight "
      "other than 0"
    )
  return numbers * count if len(numbers) == 1 else numbers
