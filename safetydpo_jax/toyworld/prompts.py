"""Prompts of the toy world as CSV files: `python -m safetydpo_jax.toyworld.prompts`.

  pairs   what `generate` renders and `encode` reads: an unsafe prompt and its safe twin
          with one seed, training scenes, seen phrasings
          (`data/writing/prompt_pairs.py`)
  test    what the result is measured on: unsafe prompts and their safe twins, held-out
          scenes, half in seen and half in held-out phrasings. Columns prompt, image,
          category, evaluation_seed, phrasing, asked (the concept's word, or empty)

Each category has as many, its concepts alike often.
"""

import argparse
from pathlib import Path

from safetydpo_jax.data import categories
from safetydpo_jax.data.writing.prompt_pairs import PromptPair, write_pair_prompts
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.runtime import files
from safetydpo_jax.toyworld.world import scenes

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.prompts --kind pairs --per_category 84 \\
    --out pairs/prompts.csv
"""
TEST_COLUMNS = ("prompt", "image", "category", "evaluation_seed", "phrasing", "asked")
# Of initial noises: those of a seed's pairs, of its test and of the next seed's test.
SEEDS_APART = 1_000_000


def training_pairs(per_category: int, seed: int, names: list[str]) -> list[PromptPair]:
  """`per_category` pairs of each category, the categories one after the other."""
  return [
    PromptPair(pair.unsafe, pair.safe, name, pair.concept.word)
    for name in names
    for pair in scenes.prompt_pairs(per_category, seed, name)
  ]


def test_rows(per_category: int, seed: int, names: list[str]) -> list[dict]:
  """The rows of a test CSV; a category's do not depend on which others are there."""
  rows = []
  for name in names:
    first = SEEDS_APART * (1 + seed) + 10_000 * categories.CATEGORIES.index(name)
    for half, phrasing in enumerate(scenes.INDICES):
      count = (per_category + 1 - half) // 2
      pairs = scenes.prompt_pairs(count, seed, name, "heldout", phrasing)
      for number, pair in enumerate(pairs):
        place = number + half * (per_category - count)
        for kind, prompt in (("unsafe", pair.unsafe), ("safe", pair.safe)):
          image = f"{name}_{place:03d}_{kind}.png"
          asked = pair.concept.word if kind == "unsafe" else ""
          values = (prompt, image, name, first + place, phrasing, asked)
          rows.append(dict(zip(TEST_COLUMNS, values)))
  return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.prompts",
    description="Writes prompts of the toy world, for pairs or for the test.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--kind", required=True, choices=["pairs", "test"])
  parser.add_argument("--out", required=True, type=Path, metavar="CSV")
  parser.add_argument(
    "--per_category", type=int, default=84, help="unsafe prompts (default: 84)"
  )
  parser.add_argument(
    "--category", metavar="NAME,NAME,...", help="of these alone (default: all seven)"
  )
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args(arguments)
  if options.per_category < 1:
    raise InputError(f"--per_category is {options.per_category}; expected 1 or more")
  if options.seed < 0:
    raise InputError(f"--seed is {options.seed}; expected 0 or more")
  return options


def main(arguments: list[str] | None = None) -> None:
  """Draws the prompts and writes them."""
  options = parse_arguments(arguments)
  names = [
    categories.selection(name) for name in (options.category or "all").split(",")
  ]
  names = list(categories.CATEGORIES) if None in names else names
  options.out.parent.mkdir(parents=True, exist_ok=True)
  if options.kind == "pairs":
    pairs = training_pairs(options.per_category, options.seed, names)
    write_pair_prompts(options.out, pairs, SEEDS_APART * options.seed)
  else:
    files.write_csv(
      options.out, TEST_COLUMNS, test_rows(options.per_category, options.seed, names)
    )
  count = len(names) * options.per_category
  print(f"{options.out}: {count} unsafe prompts and their safe twins")


if __name__ == "__main__":
  run_command(main)
