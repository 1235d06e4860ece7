"""Keeping test and training apart: held-out pairs, and test prompts seen in training.

Whether a pair is held out depends on its images' names alone, so the choice is the same
for every layout, category, cache and run, and does not change when other pairs join or
leave the dataset:

  (1)  held out  ⇔  u(id) < share,  u(id) = first 64 bits of sha256(id) / 2^64

728 of CoProV2's 8,000 test prompts are also training prompts, word for word; scores
without those rows tell generalisation from memorisation.
"""

import hashlib
import os
import re
from pathlib import Path

from safetydpo_jax.data import prompts
from safetydpo_jax.data.sources import layouts
from safetydpo_jax.errors import InputError


def is_held_out(id: str, share: float) -> bool:
  """Equation (1). Pairs of the same images ("ID", "ID#2", …) stay together.

  Raises:
    InputError: the share is not in [0, 1).
  """
  if not 0 <= share < 1:
    raise InputError(f"holdout is {share}; expected 0 ≤ holdout < 1")
  digest = hashlib.sha256(re.sub(r"#\d+$", "", id).encode()).digest()
  return int.from_bytes(digest[:8], "big") < share * 2**64


def leaked_rows(test_csv: Path, train_csv: str | os.PathLike) -> list[bool]:
  """Which rows of a test CSV are also training prompts, safe or unsafe, word for word.

  Args:
    test_csv: a CSV of prompts, see `data/prompts.py`.
    train_csv: CoProV2's CSV of training pairs.

  Raises:
    InputError: a file cannot be read.
  """
  pairs = layouts.read_official(train_csv)
  seen = {text for pair in pairs for text in pair.captions}
  return [row.prompt in seen for row in prompts.read_prompts(test_csv, Path())]
