"""The LoRA that training starts from: a fresh one, or with `lora.init` a finished one.

A finished LoRA has its scale s = alpha / r folded into b; training holds b without it,
so b is divided by this run's s. Then step 0 is the finished LoRA exactly, whatever
alpha it was trained with.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from safetydpo_jax import lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.loras import load as loras


def first_lora(
  settings: Any, pipeline: Pipeline
) -> tuple[Callable[[], dict], dict[str, str] | None]:
  """What a run's state is made with, and where it comes from.

  Args:
    settings: `config.lora`.
    pipeline: the base model.

  Returns:
    A function that gives the LoRA tree, scale not folded in, to be called under jit;
    and with `lora.init` the file's path and the hash of its factors, else None.

  Raises:
    InputError: a target, rank or alpha that cannot be, or `lora.init` does not fit.
  """
  shapes = pipeline.unet_shapes()

  def fresh():
    return lora.init_lora(
      jax.random.key(settings.seed),
      shapes,
      settings.rank,
      settings.targets,
      settings.rank_pattern,
    )

  wanted = jax.eval_shape(fresh)
  lora.alphas(wanted, settings.alpha, settings.alpha_pattern)
  if not settings.init:
    return fresh, None
  tree, about = loras.load_lora(settings.init)
  loras.check_fits(settings.init, about, pipeline.fingerprint)
  check_fits(tree, wanted, settings.init)
  origin = {"path": settings.init, "sha256": lora.factors_sha256(tree)}
  tree = lora.unfold_alpha(tree, settings.alpha, settings.alpha_pattern)
  return lambda: jax.tree.map(jnp.asarray, tree), origin


def check_fits(tree: Any, wanted: Any, name: str) -> None:
  """Raises `InputError` unless training can go on from `tree` in place of `wanted`.

  Args:
    tree: what was read from `name`.
    wanted: what `lora.init_lora` gives for the config (arrays or shapes).
    name: the file, for errors.
  """
  there, here = flatten_dict(tree), flatten_dict(wanted)
  for path in sorted(there.keys() ^ here.keys()):
    layer = "/".join(path[:-1])
    differs = f"{layer} is adapted there and no layer of lora.targets"
    if path in here:
      differs = f"{layer} is a layer of lora.targets and not adapted there"
    raise InputError(f"lora.init {name}: {differs}; set lora.targets to the file's")
  for path, leaf in sorted(there.items()):
    if leaf.shape == here[path].shape:
      continue
    layer, side = "/".join(path[:-1]), -1 if path[-1] == "a" else 0
    ranks = leaf.shape[side], here[path].shape[side]
    if ranks[0] == ranks[1]:
      raise InputError(
        f"lora.init {name}: {layer}/{path[-1]} is {leaf.shape}, the model's is "
        f"{here[path].shape}; give a LoRA of this model"
      )
    raise InputError(
      f"lora.init {name}: {layer} has rank {ranks[0]}, the config says {ranks[1]}; set "
      "lora.rank and lora.rank_pattern to the file's"
    )
