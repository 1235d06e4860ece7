"""What is kept apart: pairs held out of training, test prompts that training has seen.

A pair is held out for what its images are called, so the choice is the same for every
layout, category, cache and run, and pairs that join or leave a dataset change no other:

  (1)  held out  ⇔  u(id) < share,  u(id) = first 64 bits of sha256(id) / 2^64

Of CoProV2's 8,000 test prompts 728 stand verbatim in its training prompts; scores
without those rows tell learning from remembering.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence

from safetydpo_jax.errors import InputError


def is_held_out(id: str, share: float) -> bool:
  """Equation (1). Pairs of the same images ("ID", "ID#2", …) stay together.

  Raises:
    InputError: the share is not in [0, 1).
  """
  if not 0 <= share < 1:
    raise InputError(f"holdout {share} is no share; expected 0 ≤ holdout < 1")
  digest = hashlib.sha256(re.sub(r"#\d+$", "", id).encode()).digest()
  return int.from_bytes(digest[:8], "big") < share * 2**64


def leaked_prompts(prompts: Sequence[str], seen: Iterable[str]) -> list[bool]:
  """Which of a test's prompts stand verbatim among the captions of training.

  Args:
    prompts: the test's, in order.
    seen: captions of training; those of a dataset are
      `[text for pair in read_official(CSV) for text in pair.captions]`.
  """
  known = set(seen)
  return [prompt in known for prompt in prompts]
