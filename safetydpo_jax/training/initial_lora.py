"""The LoRA that training starts from: a fresh one, or with `lora.init` a finished one.

A finished LoRA has its scale s = alpha / r folded into b, training holds b without it:
so b is divided by this run's s. Step 0 is then exactly the finished LoRA, whatever
alpha it was trained with.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from safetydpo_jax import lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.loras import load as loras
from safetydpo_jax.lora import FactorTree, LoraTree, Tree
from safetydpo_jax.training.config import LoraConfig


class InitialLora(NamedTuple):
  """How to make the LoRA of step 0, and where it comes from.

  Attributes:
    make: gives the factors; to be called under jit.
    origin: with `lora.init` the file's path and the hash of its factors, else None.
  """

  make: Callable[[], FactorTree]
  origin: dict[str, str] | None


def first_lora(settings: LoraConfig, pipeline: Pipeline) -> InitialLora:
  """The LoRA that a run starts from.

  Args:
    settings: `config.lora`.
    pipeline: the base model.

  Raises:
    InputError: a target or a pattern matches no layer, or `lora.init` does not fit.
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
    return InitialLora(fresh, None)
  read, about = loras.load_lora(settings.init, pipeline.unet.config)
  tree = LoraTree(read)
  loras.check_fits(settings.init, about, pipeline.fingerprint)
  check_fits(tree, wanted, settings.init)
  origin = {"path": settings.init, "sha256": lora.factors_sha256(tree)}
  factors = lora.unfold_alpha(tree, settings.alpha, settings.alpha_pattern)
  return InitialLora(lambda: jax.tree.map(jnp.asarray, factors), origin)


def check_fits(tree: LoraTree, wanted: Tree, name: str) -> None:
  """Raises `InputError` unless training can go on from `tree` in place of `wanted`.

  Args:
    tree: what was read from `name`.
    wanted: what `lora.init_lora` gives for the config (arrays or shapes).
    name: the file, for errors.
  """
  there, here = flatten_dict(tree), flatten_dict(wanted)
  for path in sorted(there.keys() ^ here.keys()):
    layer = "/".join(path[:-1])
    differs = f"it adapts {layer}, which is not a layer of lora.targets"
    if path in here:
      differs = f"it does not adapt {layer}, which is a layer of lora.targets"
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
      f"lora.init {name}: {layer} has rank {ranks[0]}, the config has {ranks[1]}; set "
      "lora.rank and lora.rank_pattern to the file's"
    )
