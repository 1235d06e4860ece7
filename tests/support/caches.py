"""Small caches for tests, and how to compare them byte for byte."""

import json

from safetydpo_jax import encode
from safetydpo_jax.data.cache import records

PAIRS = 6


def run(model, pairs, out, *more):
  arguments = ["--model", model, "--pairs", pairs, "--out", out, "--shard_size", 2]
  encode.main([str(argument) for argument in (*arguments, *more)])
  return records.open_cache(out)


def contents(path):
  """{name: bytes} of a folder, without the manifest's counts of rows."""
  files = {file.name: file.read_bytes() for file in path.iterdir()}
  content = json.loads(files.pop("cache.json"))
  del content["counts"]
  return {**files, "cache.json": content}
