"""How many pairs a second one host feeds: `python benchmarks/data_pipeline.py`.

Writes a synthetic cache of Stable Diffusion 1.5's size to a temporary folder (262 kB a
pair), reads it with `train_batches`, and prints pairs per second and peak memory.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from safetydpo_jax.data.cache import batches, records, shards
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.data.sources.pairs import SLOTS


def write_cache(
  path: Path, pairs: int, latent_shape=(64, 64, 4), encoders=1, shard_size=256
) -> Path:
  """A cache of random moments and token ids, complete and valid. → `path`"""
  rng = np.random.default_rng(0)
  fields = shards.record_fields(latent_shape, encoders, 77)
  settings = {
    "format": records.FORMAT_VERSION,
    "base": "synthetic",
    "scaling_factor": 0.18215,
    "resolution": 8 * latent_shape[0],
    "latent_shape": list(latent_shape),
    "shard_size": shard_size,
  }
  entries = [
    records.Entry(f"pair {i}", (CATEGORIES[i % len(CATEGORIES)],), SLOTS)
    for i in range(pairs)
  ]
  path.mkdir(parents=True, exist_ok=True)

  def make(entry):
    arrays = {
      "moments": rng.standard_normal(fields[0].shape, np.float32),
      "token_ids": rng.integers(1, 49408, fields[1].shape),
    }
    return shards.pack(fields, arrays, entry._asdict())

  for i, name in enumerate(shards.shard_names(pairs, shard_size)):
    block = entries[i * shard_size : (i + 1) * shard_size]
    shards.write_shard(path / name, map(make, block))
  empty = np.full((encoders, 77), 49407).tolist()
  records.complete_cache(
    path, settings, entries, fields, model="synthetic", empty_token_ids=empty
  )
  return path


def main() -> None:
  parser = argparse.ArgumentParser(
    description="Speed of the data pipeline on a synthetic cache.",
    epilog="example: python benchmarks/data_pipeline.py --pairs 2000 --threads 2",
  )
  add = parser.add_argument
  add("--pairs", type=int, default=2000, help="in the cache (default: 2000)")
  add("--latent_size", type=int, default=64, help="128 for SDXL (default: 64)")
  add("--batch_size", type=int, default=16, help="pairs (default: 16)")
  add("--steps", type=int, default=1000, help="batches to read (default: 1000)")
  add("--threads", type=int, default=2, help="that read (default: 2)")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    shape = (arguments.latent_size, arguments.latent_size, 4)
    path = write_cache(Path(folder) / "cache", arguments.pairs, shape)
    feed = batches.train_batches(
      records.open_cache(path),
      category=None,
      mixture="both",
      batch_size=arguments.batch_size,
      seed=0,
      start_step=0,
      steps=arguments.steps,
      threads=arguments.threads,
    )
    next(feed)
    before = _peak_memory()
    start = time.perf_counter()
    steps = sum(1 for _ in feed)
    seconds = time.perf_counter() - start
  print(
    f"{steps * arguments.batch_size / seconds:,.0f} pairs/s "
    f"({arguments.threads} threads, batch {arguments.batch_size}, latents "
    f"{arguments.latent_size}²); peak memory {_peak_memory() / 2**20:.0f} MiB, "
    f"{(_peak_memory() - before) / 2**20:.0f} MiB of it after the first batch"
  )


def _peak_memory() -> int:
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
  main()
