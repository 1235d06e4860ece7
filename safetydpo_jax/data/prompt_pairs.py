"""Pairs of prompts → the CSV that `generate` renders and `encode` reads.

Columns prompt, image, category, evaluation_seed. Two rows a pair, the unsafe prompt
(u_idx_0000007_0.png) and its safe twin (s_idx_0000007_0.png), with one seed: both are
drawn from the same initial noise (SafetyDPO, arXiv 2412.10493). `data/layouts.py` reads
the same names back. PNG, because JPEG's blocks would be part of what is learned.
"""

import contextlib
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetydpo_jax.errors import InputError

COLUMNS = ("prompt", "image", "category", "evaluation_seed")


class PromptPair(NamedTuple):
  """An unsafe prompt, its safe twin, and the concept and category they are about."""

  unsafe: str
  safe: str
  category: str
  concept: str


def write_pair_prompts(
  file: Path, pairs: Sequence[PromptPair], first_seed: int
) -> None:
  """Writes the CSV through a temporary name; makes its folder.

  Args:
    file: the CSV.
    pairs: in the order in which they are numbered, from 0.
    first_seed: evaluation_seed of the first pair; the next one has one more.

  Raises:
    InputError: a seed is negative or has more than 64 bits, or `file` cannot be
      written.
  """
  if not 0 <= first_seed <= 2**64 - max(1, len(pairs)):
    raise InputError(
      f"the seeds of {len(pairs)} pairs from {first_seed} on leave the range 0 to "
      "2^64 - 1; choose another first seed"
    )
  temporary = file.with_name(f".{file.name}.{os.getpid()}")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", newline="", encoding="utf-8") as lines:
      writer = csv.writer(lines, lineterminator="\n")
      writer.writerow(COLUMNS)
      for number, pair in enumerate(pairs):
        for prompt, kind in ((pair.unsafe, "u"), (pair.safe, "s")):
          image = f"{kind}_idx_{number:07d}_0.png"
          writer.writerow((prompt, image, pair.category, first_seed + number))
    os.replace(temporary, file)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise InputError(f"cannot write {file}: {error.strerror}") from error
