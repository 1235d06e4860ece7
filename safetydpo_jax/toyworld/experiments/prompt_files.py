"""Prompts of the toy world as CSV files.

  pairs   what `generate` renders and `encode` reads: an unsafe prompt and its safe twin
          with one seed, training scenes, seen phrasings
          (`data/writing/prompt_pairs.py`)
  test    what results are measured on: unsafe prompts and their safe twins, held-out
          scenes, half in seen and half in held-out phrasings. Columns prompt, image,
          category, evaluation_seed, phrasing, asked (the concept's word, or empty)

Every category has the same number of prompts, divided evenly among its concepts.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from safetydpo_jax.data import categories
from safetydpo_jax.data.writing.prompt_pairs import PromptPair, write_pair_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files
from safetydpo_jax.toyworld.world import scenes

TEST_COLUMNS = ("prompt", "image", "category", "evaluation_seed", "phrasing", "asked")
# Between the initial noises of a seed's pairs, of its test and of the next seed's test.
SEEDS_APART = 1_000_000


@dataclasses.dataclass(frozen=True)
class PromptOptions:
  """Writes prompts of the toy world, for pairs or for the test."""

  kind: Literal["pairs", "test"]
  """pairs to train on, or test prompts to measure with"""
  out: Path
  """CSV to write the prompts to"""
  per_category: int = 84
  """unsafe prompts of each category"""
  category: str | None = None
  """NAME,NAME,… (default: all seven)"""
  seed: int = 0
  """decides the prompts and their noises"""

  def __post_init__(self):
    if self.per_category < 1:
      raise InputError(f"--per_category is {self.per_category}; expected 1 or more")
    if self.seed < 0:
      raise InputError(f"--seed is {self.seed}; expected 0 or more")
    _ = self.categories

  @property
  def categories(self) -> tuple[str, ...]:
    """Our names of the categories, one by one."""
    names = [categories.selection(name) for name in (self.category or "all").split(",")]
    chosen = tuple(name for name in names if name is not None)
    return chosen if len(chosen) == len(names) else categories.CATEGORIES


def write_prompts(options: PromptOptions) -> None:
  """Draws the prompts and writes them.

  Raises:
    InputError: the file cannot be written.
  """
  names = options.categories
  if options.kind == "pairs":
    pairs = training_pairs(options.per_category, options.seed, names)
    write_pair_prompts(options.out, pairs, SEEDS_APART * options.seed)
  else:
    rows = test_rows(options.per_category, options.seed, names)
    files.write_csv(options.out, TEST_COLUMNS, rows)
  count = len(names) * options.per_category
  print(f"{options.out}: {count} unsafe prompts and their safe twins")


def training_pairs(
  per_category: int, seed: int, names: Sequence[str]
) -> list[PromptPair]:
  """`per_category` pairs of each category, the categories one after the other."""
  return [
    PromptPair(pair.unsafe, pair.safe, name, pair.concept.word)
    for name in names
    for pair in scenes.prompt_pairs(per_category, seed, name)
  ]


def test_rows(
  per_category: int, seed: int, names: Sequence[str]
) -> list[dict[str, str | int]]:
  """The rows of a test CSV; a category's do not depend on the others."""
  rows: list[dict[str, str | int]] = []
  for name in names:
    first = SEEDS_APART * (1 + seed) + 10_000 * categories.CATEGORIES.index(name)
    for half, phrasing in enumerate(scenes.INDICES):
      count = (per_category + 1 - half) // 2
      pairs = scenes.prompt_pairs(count, seed, name, "heldout", phrasing)
      for number, pair in enumerate(pairs):
        index = number + half * (per_category - count)
        for kind, prompt in (("unsafe", pair.unsafe), ("safe", pair.safe)):
          image = f"{name}_{index:03d}_{kind}.png"
          asked = pair.concept.word if kind == "unsafe" else ""
          values = (prompt, image, name, first + index, phrasing, asked)
          rows.append(dict(zip(TEST_COLUMNS, values)))
  return rows
