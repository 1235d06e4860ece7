"""Reading a LoRA named on the command line: `L` or `L:scale`.

`L` is, in this order:

  a file               of any dialect that `read.py` knows
  a folder             with expert.json: a run or a merge of ours
                       with adapter_config.json: PEFT's; else one of our exports, or of
                       diffusers'; else the only .safetensors file in it; else the only
                       PEFT folder in it, or the one called unet
  owner/name[/file]    on the Hugging Face hub
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import hub
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.base_model.single_file import SUFFIX
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras import expert, kohya
from safetydpo_jax.formats.loras.adapter import Adapter
from safetydpo_jax.formats.loras.read import (
  PEFT_CONFIG,
  read_lora_file,
  read_peft_folder,
)
from safetydpo_jax.formats.loras.write import FILE_NAME
from safetydpo_jax.formats.tensors import HOW_TO_CONVERT, PICKLES
from safetydpo_jax.lora import LoraTree
from safetydpo_jax.runtime.log import note

_ON_HUB = re.compile(r"\w[\w.-]*/[\w.-]+(/.+\.safetensors)?", re.ASCII)


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


def load_lora(
  name: str, unet_config: Mapping[str, Any] | None = None
) -> tuple[LoraTree, dict[str, Any]]:
  """The LoRA tree (scale folded in) and what is known about it.

  Args:
    name: L, see the module's docstring.
    unet_config: the base UNet's config.json, see `read.read_lora_file`.

  Returns:
    The tree, numpy float32, and expert.json's content; {} for a foreign file, which
    does not say which model it was made for.

  Raises:
    InputError: there is none, it is damaged, or it holds what a LoRA does not
      (`adapter.as_lora`).
  """
  adapter, about = load_adapter(name, unet_config)
  return adapters.as_lora(adapter, name), about


def load_adapter(
  name: str, unet_config: Mapping[str, Any] | None = None
) -> tuple[Adapter, dict[str, Any]]:
  """As `load_lora`, with what a file changes besides: DoRA, norms, biases, kernels."""
  path = Path(name)
  # A file that is missing: no repository is called NAME.safetensors, and this is not
  # one of a repository where there is such a folder.
  file = name.lower().endswith(SUFFIX) and (
    name.count("/") == 1 or path.parent.is_dir()
  )
  if not path.exists() and _ON_HUB.fullmatch(name) and not file:
    path = hub.locate_lora(name)
  if path.is_file():
    return read_lora_file(path, unet_config=unet_config), {}
  if path.is_dir():
    return _read_folder(path, unet_config)
  raise InputError(
    f"there is no LoRA at {name}; give a run directory, a .safetensors file or a hub id"
  )


def _read_folder(
  folder: Path, unet_config: Mapping[str, Any] | None
) -> tuple[Adapter, dict[str, Any]]:
  if (folder / expert.MANIFEST).is_file():  # also with an export of it in the folder
    lora, about = expert.read_expert(folder)
    return adapters.of_lora(lora), about
  if (folder / PEFT_CONFIG).is_file():
    return read_peft_folder(folder, unet_config), {}
  if (folder / "model_index.json").is_file():
    raise InputError(f"{folder} is a whole model, not a LoRA; give it as --model")
  for file in (folder / FILE_NAME, folder / kohya.FILE_NAME):
    if file.is_file():
      return read_lora_file(file, unet_config=unet_config), {}
  there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
  if files := [path for path in there if path.suffix == ".safetensors"]:
    file = _only(files, folder, "LoRA files")
    return read_lora_file(file, unet_config=unet_config), {}
  inside = [path for path in there if (path / PEFT_CONFIG).is_file()]
  if inside:
    unets = [path for path in inside if path.name == "unet"]
    inner = _only(unets or inside, folder, "PEFT adapters")
    return read_peft_folder(inner, unet_config), {}
  if pickles := [path.name for path in there if path.suffix in PICKLES]:
    raise InputError(f"{folder} has its LoRA only as {pickles[0]}; {HOW_TO_CONVERT}")
  raise InputError(
    f"{folder} is not a LoRA: it has no {expert.MANIFEST}, which a finished run has, "
    f"no {SUFFIX} file and no {PEFT_CONFIG}"
  )


def _only(paths: list[Path], folder: Path, what: str) -> Path:
  """The one of `paths`; several cannot be chosen between."""
  if len(paths) > 1:
    raise InputError(
      f"{folder} holds {len(paths)} {what}, {paths[0].name} and {paths[1].name} among "
      "them; give one of them by name"
    )
  return paths[0]


def check_fits(
  name: str, about: dict[str, Any], fingerprint: str, any_base: bool | None = None
) -> None:
  """Raises `InputError` if LoRA `name` was trained on another base model.

  Args:
    name: of the LoRA.
    about: its expert.json; {} does not say which model it was trained on.
    fingerprint: of the model it is used with.
    any_base: the command's --any_base: print a line instead; None: it has none.
  """
  base = about.get("base")
  if not base or base["fingerprint"] == fingerprint:
    return
  found = (
    f"{name} was trained on {base['name']} (fingerprint {base['fingerprint']}), this "
    f"model has fingerprint {fingerprint}"
  )
  if any_base:
    note(f"--any_base: {found}; it is used anyway")
    return
  flag = "" if any_base is None else "add --any_base, or "
  raise InputError(
    f"{found}; give the model it was trained on; if this one is a fine-tune of it, "
    f"{flag}export the LoRA with its own model and give the exported file"
  )


def load_adapters(
  names: list[str], pipeline: Pipeline, any_base: bool | None = None
) -> Adapter:
  """The sum of the named adapters, which fits the pipeline's UNet.

  Args:
    names: L or L:scale each.
    pipeline: the base model, with the UNet's weights.
    any_base: see `check_fits`.

  Raises:
    InputError: one is missing, is damaged, or does not fit.
  """
  found = []
  for name, factor in map(split_scale, names):
    adapter, about = load_adapter(name, pipeline.unet.config)
    check_fits(name, about, pipeline.fingerprint, any_base)
    adapters.check_shapes(pipeline.params["unet"], adapter)
    found.append(adapters.scale(adapter, factor))
  return adapters.add(found)


def load_loras(names: list[str], pipeline: Pipeline) -> LoraTree:
  """As `load_adapters`, as a LoRA and nothing besides."""
  return adapters.as_lora(load_adapters(names, pipeline), " + ".join(names))
