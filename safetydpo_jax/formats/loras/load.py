"""Reading a LoRA named on the command line: `L` or `L:scale`."""

import math
from pathlib import Path
from typing import Any

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.loras import expert, kohya
from safetydpo_jax.formats.loras.read import (
  PEFT_CONFIG,
  read_lora_file,
  read_peft_folder,
)
from safetydpo_jax.formats.loras.write import FILE_NAME
from safetydpo_jax.lora import LoraTree


def split_scale(text: str) -> tuple[str, float]:
  """`merged:0.7` → ('merged', 0.7); without a number the scale is 1.

  Raises:
    InputError: the number is not finite.
  """
  name, _, number = text.rpartition(":")
  try:
    factor = float(number) if name else 1.0
  except ValueError:
    name, factor = text, 1.0
  if not math.isfinite(factor):
    raise InputError(f"--lora {text}: the scale is {number}; expected a finite number")
  return name or text, factor


def load_lora(name: str) -> tuple[LoraTree, dict[str, Any]]:
  """The LoRA tree (scale folded in) and what is known about it.

  Args:
    name: a run directory or merged directory; a LoRA file in diffusers, PEFT or kohya
      naming; or a folder that diffusers, PEFT or our export wrote one in.

  Returns:
    The tree, numpy float32, and expert.json's content; {} for a foreign file, which
    does not say which model it was made for.

  Raises:
    InputError: there is none, or it is damaged.
  """
  path = Path(name)
  if path.is_file():
    return LoraTree(read_lora_file(path)), {}
  if (path / expert.MANIFEST).is_file():  # also with an export of it in the folder
    return expert.read_expert(path)
  if (path / PEFT_CONFIG).is_file():
    return LoraTree(read_peft_folder(path)), {}
  for file in (path / FILE_NAME, path / kohya.FILE_NAME):
    if file.is_file():
      return LoraTree(read_lora_file(file)), {}
  if path.is_dir():
    return expert.read_expert(path)
  raise InputError(
    f"there is no LoRA at {name}; give a run directory or a .safetensors file"
  )


def check_fits(name: str, about: dict[str, Any], fingerprint: str) -> None:
  """Raises `InputError` if LoRA `name` was trained on another base model."""
  base = about.get("base")
  if base and base["fingerprint"] != fingerprint:
    raise InputError(
      f"{name} was trained on {base['name']} (fingerprint {base['fingerprint']}), this "
      f"model has fingerprint {fingerprint}; give the model it was trained on"
    )


def load_loras(names: list[str], pipeline: Pipeline) -> LoraTree:
  """The sum of the named LoRAs, {} without any."""
  trees = []
  for name, factor in map(split_scale, names):
    tree, about = load_lora(name)
    check_fits(name, about, pipeline.fingerprint)
    lora_lib.check_shapes(pipeline.params["unet"], tree)
    trees.append(lora_lib.scale(tree, factor))
  return lora_lib.add(trees)
