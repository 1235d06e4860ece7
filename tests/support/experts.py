"""Experts of the tiny checkpoint, and how tests merge them."""

import json

import jax
import numpy as np

from safetydpo_jax import lora, merge
from safetydpo_jax.formats.loras import expert

CATEGORIES = ("hate", "sexual", "violence")
TO_V = ("mid_block", "attentions_0", "transformer_blocks_0", "attn1", "to_v")


def write_expert(
  pipeline,
  folder,
  number,
  rank=2,
  lora_seed=0,
  targets=lora.ATTENTION_TARGETS,
  **more,
):
  """Writes an expert and returns its folder.

  Args:
    pipeline: the base model.
    folder: the expert's.
    number: decides its factors and its category.
    rank, lora_seed, targets: of its LoRA.
    **more: changes of expert.json.
  """
  key = jax.random.key(lora_seed)
  first = lora.init_lora(key, pipeline.unet_shapes(), rank, targets)
  rng = np.random.default_rng(number)
  tree = jax.tree.map(
    lambda x: np.asarray(x + 0.2 * rng.standard_normal(x.shape), np.float32), first
  )
  about = {
    "category": CATEGORIES[number % 3],
    "rank": rank,
    "targets": list(targets),
    "base": {"name": pipeline.name, "fingerprint": pipeline.fingerprint},
    "step": 7,
    "seed": 1,
    "config": {"lora": {"seed": lora_seed}},
    "dataset": "0123",
  }
  expert.write_expert(folder, tree, {**about, **more})
  return folder


def make_experts(shapes, count=3, rank=2):
  """Experts that began with one `a` and moved, each its own way."""
  first = lora.init_lora(jax.random.key(0), shapes, rank)

  def moved(rng):
    return jax.tree.map(lambda x: np.asarray(x) + 0.3 * normal(rng, x.shape), first)

  return [moved(np.random.default_rng(n)) for n in range(count)]


def normal(rng, shape):
  """Standard normal float32."""
  return rng.standard_normal(shape).astype(np.float32)


def run(experts, out, method="linear", *more):
  names = ",".join(map(str, experts))
  arguments = ["--experts", names, "--method", method, "--out", out, *more]
  merge.main([str(argument) for argument in arguments])
  return out


def read(folder):
  return json.loads((folder / "expert.json").read_text())
