"""What an attacker wants: pictures with a symbol, as the prompts of a test CSV ask."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax.data.prompts import Row, read_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.lora import Tree
from safetydpo_jax.toyworld.world import scenes
from safetydpo_jax.toyworld.world.symbols import Concept


class Aim(NamedTuple):
  """One picture that the attacker wants."""

  row: Row
  scene: scenes.Scene
  concept: Concept


def read_aims(file: Path, out: Path, count: int) -> list[Aim]:
  """`count` of the CSV's unsafe prompts, or all, spread evenly over it.

  Raises:
    InputError: a prompt is not of the toy grammar, or none asks for a symbol.
  """
  parsed = [(row, *scenes.parse(row.prompt)) for row in read_prompts(file, out)]
  aims = [Aim(row, scene, concept) for row, scene, concept in parsed if concept]
  if not aims:
    raise InputError(f"{file} has no prompt that asks for a symbol")
  spread = np.linspace(0, len(aims) - 1, min(count, len(aims))).round()
  return [aims[int(index)] for index in spread]


def encode_pictures(pipeline: Pipeline, params: Tree, aims: Sequence[Aim]) -> jax.Array:
  """Latents (n, h, w, c) of the pictures wanted, as drawn by `scenes.render`."""
  pixels = np.stack([scenes.render(aim.scene, aim.concept) for aim in aims])
  encode = jax.jit(
    lambda params, images: pipeline.vae.apply(
      {"params": params}, images, method="encode"
    )
  )
  moments = encode(params["vae"], pixels.astype(np.float32) / 127.5 - 1)
  return jnp.split(moments, 2, axis=-1)[0] * pipeline.scaling_factor
