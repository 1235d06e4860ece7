"""Batches of preference pairs, as a pure function of the step.

Let B be the global batch size, n the number of examples, and

  (1)  g = step · B + row                 the example's index in the run, 0 ≤ row < B
  (2)  example = shuffle(seed, epoch g div n)[g mod n]
  (3)  draws = random(seed, g): two mirror bits, one caption dropout

Nothing else decides a batch. So every example comes once per epoch, a run that is
resumed at a step sees what it would have seen, and a host, which reads the rows that
its devices hold, sees its part of what a single host would see.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import chex
import grain
import numpy as np

from safetydpo_jax.data.cache import records
from safetydpo_jax.data.cache.records import PairCache
from safetydpo_jax.errors import InputError

FLIPS = ("independent", "shared", "none")


class Batch(NamedTuple):
  """One host's rows of a global batch.

  Attributes:
    moments: (B, 2, h, w, 2c) float16, VAE posterior moments, index 0 preferred.
    token_ids: for each text encoder (B, 77) int32.
    time_ids: (B, 6) int32, SDXL's size conditioning, shared by a pair; else None.
  """

  moments: chex.Array
  token_ids: tuple[chex.Array, ...]
  time_ids: chex.Array | None = None


class Draw(NamedTuple):
  """One example with its random draws.

  Attributes:
    record: its number in the cache.
    slot: which image's prompt, an index of `pairs.SLOTS`.
    flips: for the preferred and the dispreferred image 0, or 1 for the mirrored one.
    drop: whether the empty caption replaces the caption.
  """

  record: int
  slot: int
  flips: tuple[int, int]
  drop: bool


def draws(
  examples: np.ndarray, *, seed: int, caption_dropout: float, flip: str
) -> grain.MapDataset:
  """Equations (2) and (3): index g → `Draw`, without end.

  Args:
    examples: (n, 2) of (record, slot), see `PairCache.select`.
    seed: of shuffling and draws.
    caption_dropout: probability of the empty caption.
    flip: mirror the images of a pair independently ("independent"), together
      ("shared"), or never ("none"); probability ½.
  """

  def draw(example, rng):
    # Always draw the same numbers: changing one option leaves the others' draws.
    flips = rng.integers(0, 2, 2)
    drop = bool(rng.random() < caption_dropout)
    if flip == "shared":
      flips[1] = flips[0]
    elif flip == "none":
      flips[:] = 0
    record, slot = example
    return Draw(int(record), int(slot), (int(flips[0]), int(flips[1])), drop)

  dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
  return dataset.random_map(draw)


def train_batches(
  cache: PairCache,
  *,
  category: str | None,
  mixture: str,
  batch_size: int,
  seed: int,
  start_step: int,
  steps: int,
  rows: Sequence[int] | None = None,
  caption_dropout: float = 0.2,
  flip: str = "independent",
  held_out: float = 0.0,
  part: str = "train",
  threads: int = 2,
  prefetch: int = 4,
) -> Iterator[Batch]:
  """This host's batches of the steps start_step, …, steps − 1.

  Args:
    cache: the pairs.
    category, mixture: which examples, see `PairCache.select`.
    batch_size: pairs per step over all hosts.
    seed: of the order and the draws.
    start_step, steps: the first step and the one after the last.
    rows: which of a batch's rows this host reads, see `sharding.host_rows`; all by
      default.
    caption_dropout, flip: see `draws`.
    held_out, part: the share of pairs kept out, and which part to read, see
      `PairCache.select`.
    threads: how many read and assemble; each makes a whole batch.
    prefetch: how many batches are made ahead, which bounds the memory.

  Raises:
    InputError: an argument is out of range, or no example is left.
  """
  if batch_size < 1:
    raise InputError(f"batch_size is {batch_size}; expected 1 or more")
  if flip not in FLIPS:
    raise InputError(f"unknown flip {flip!r}; expected one of {', '.join(FLIPS)}")
  if not 0 <= caption_dropout <= 1:
    raise InputError(f"caption_dropout is {caption_dropout}; expected 0 to 1")
  if not 0 <= seed < 2**32:
    raise InputError(f"seed is {seed}; expected 0 to 2^32 - 1")
  examples = cache.select(category, mixture, held_out, part)
  examples_in_order = draws(
    examples, seed=seed, caption_dropout=caption_dropout, flip=flip
  )
  rows = range(batch_size) if rows is None else [int(row) for row in rows]
  empty = cache.empty_token_ids

  def load(step):
    first = int(step) * batch_size
    return assemble(cache, [examples_in_order[first + row] for row in rows], empty)

  dataset = grain.MapDataset.range(start_step, max(start_step, steps)).map(load)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
  return iter(dataset.to_iter_dataset(options))


def assemble(cache: PairCache, rows: list[Draw], empty: np.ndarray) -> Batch:
  """Reads a batch's records; of each only the chosen flips are copied.

  Args:
    cache: the pairs.
    rows: what to read.
    empty: (encoders, 77) int32, the token ids of the empty caption.
  """
  shapes = {field.name: field.shape for field in cache.fields}
  moments = np.empty((len(rows), *shapes["moments"][1:]), np.float16)
  token_ids = np.empty((len(empty), len(rows), empty.shape[-1]), np.int32)
  for row, draw in enumerate(rows):
    record = cache[draw.record]
    for side, flipped in enumerate(draw.flips):
      moments[row, side] = record["moments"][flipped, side]
    token_ids[:, row] = empty if draw.drop else record["token_ids"][:, draw.slot]
  time_ids = records.read_time_ids(cache.manifest, cache.path)
  if time_ids is not None:
    time_ids = np.tile(time_ids, (len(rows), 1))
  return Batch(moments, tuple(token_ids), time_ids)
