"""Models of the published sizes, without memory, and tiny ones of the same form.

Their single files and diffusers directories are counted, and read here and by
diffusers. See `interchange.py`.
"""

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import torch
import transformers

from safetydpo_jax.formats.base_model import single_file_accounts as accounts
from safetydpo_jax.formats.base_model import single_file_families as families
from safetydpo_jax.formats.base_model import single_file_networks as networks
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.formats.base_model.weights import canonical_name, convert
from safetydpo_jax.models import published
from tests.support import distilled, single_files
from tests.support.parity import array, draw, tensor

ENCODERS = ("text_encoder", "text_encoder_2")
Change = Callable[[dict], dict]  # a single file's tensors → those of another one


class Size(NamedTuple):
  """A published model.

  Attributes:
    family: of `single_files.FAMILIES`.
    unet: its config.json.
    texts: those of its text encoders.
    build: makes a tiny diffusers directory of its form.
  """

  family: str
  unet: Mapping[str, Any]
  texts: tuple[Mapping[str, Any], ...]
  build: Callable[[Path], Path]


_ONE, _TWO = (published.CLIP_L,), (published.CLIP_L, published.CLIP_BIGG)
_SMALL = single_files.DISTILLED
SIZES = {
  "SD 1": Size("sd1", published.SD15_UNET, _ONE, single_files.save_sd1),
  "SD 2": Size("sd2", published.SD21_UNET, (published.CLIP_H,), single_files.save_sd2),
  "SDXL": Size("sdxl", published.SDXL_UNET, _TWO, single_files.save_sdxl),
  "SSD-1B": Size("sdxl", distilled.SSD_1B, _TWO, _SMALL["ssd-1b"]),
  "KOALA-700M": Size("sdxl", distilled.KOALA_700M, _TWO, _SMALL["koala"]),
  "small-sd": Size("sd1", distilled.SMALL_SD, _ONE, _SMALL["small-sd"]),
  "tiny-sd": Size("sd1", distilled.TINY_SD, _ONE, _SMALL["tiny-sd"]),
}
_FAMILIES = {"sd1": families.SD1, "sd2": families.SD2, "sdxl": families.SDXL}
CLASSES = {
  "sd1": diffusers.StableDiffusionPipeline,
  "sd2": diffusers.StableDiffusionPipeline,
  "sdxl": diffusers.StableDiffusionXLPipeline,
}


@functools.cache
def states_of(name: str) -> dict[str, tuple[dict, dict]]:
  """{component: (config, state dict)} of a model of `SIZES`; no memory is used."""
  size = SIZES[name]
  configs = {"unet": size.unet, "vae": published.SD15_VAE}
  configs |= dict(zip(ENCODERS, size.texts))
  lists = {k: list(v) if isinstance(v, tuple) else v for k, v in size.unet.items()}
  with torch.device("meta"):
    made = {
      "unet": diffusers.UNet2DConditionModel(**lists),
      "vae": diffusers.AutoencoderKL(**published.SD15_VAE),
    }
    for name, config in zip(ENCODERS, size.texts):
      kind = getattr(transformers, config["architectures"][0])
      made[name] = kind(transformers.CLIPTextConfig(**config))
  return {name: (configs[name], module.state_dict()) for name, module in made.items()}


def count_single_file(name: str, change: Change) -> tuple[int, int]:
  """Tensors read of tensors there of a model's single file.

  Raises:
    InputError: a tensor is missing, or has no use and is not known.
  """
  size = SIZES[name]
  there = change(single_files.arrange(states_of(name), size.family))
  shapes = {key: tuple(x.shape) for key, x in there.items()}
  family = _FAMILIES[size.family]
  used = {
    part.key
    for component, config in networks.configs_of(family, shapes).items()
    for part in networks.parts_of(component, family, config, shapes).values()
  }
  left_out = accounts.account(shapes, used)
  return len(shapes) - len(left_out), len(shapes)


def count_directory(name: str) -> tuple[int, int]:
  """The same of a model's diffusers directory."""
  size = SIZES[name]
  family, found = _FAMILIES[size.family], []
  for component, (config, state) in states_of(name).items():
    match component:
      case "unet":
        ours = networks.unet_parts(config, "")
      case "vae":
        ours = networks.vae_parts(config, "")
      case _:
        encoder = next(e for e in family.encoders if e.component == component)
        ours = networks.text_parts(encoder, config, "")
    found.append(
      (len(ours.keys() & {canonical_name(key) for key in state}), len(state))
    )
  read, there = map(sum, zip(*found))
  return read, there


def measure_single_file(name: str, folder: Path, change: Change) -> float:
  """A tiny single file, read here and by diffusers; see `difference`."""
  size = SIZES[name]
  base = size.build(folder / "base")
  for tokenizer in base.glob("tokenizer*"):
    shutil.copytree(tokenizer, folder / tokenizer.name)
  tensors = change(single_files.original_tensors(base, size.family))
  file = single_files.save(folder / "m.safetensors", tensors, single_files.RESOLUTION)
  theirs = CLASSES[size.family].from_single_file(str(file), config=str(base))
  return difference(load_pipeline(file), theirs)


def measure_directory(name: str, folder: Path) -> float:
  """A tiny diffusers directory, read here and by diffusers; see `difference`."""
  base = SIZES[name].build(folder / "base")
  theirs = diffusers.DiffusionPipeline.from_pretrained(base)
  return difference(load_pipeline(base), theirs)


def difference(ours, theirs) -> float:
  """Of the UNets' predictions, relative to the largest number; weights are equal.

  Raises:
    AssertionError: a weight of any network differs.
  """
  for name in ours.modules():
    state = getattr(theirs, name).state_dict().items()
    states = ((canonical_name(key), x.float().numpy()) for key, x in state)
    own = convert(states, ours.params[name])
    jax.tree.map(np.testing.assert_array_equal, ours.params[name], own)
  config = ours.unet.config
  inputs = (
    draw(2, 8, 8, 4),
    np.array([3, 870]),
    draw(2, 5, config["cross_attention_dim"]),
  )
  added = None
  if config.get("addition_embed_type"):
    features = config["projection_class_embeddings_input_dim"]
    pooled = draw(2, features - 6 * config["addition_time_embed_dim"], seed=2)
    ids = np.array([[16, 16, 0, 0, 16, 16]] * 2, np.float32)
    added = {"text_embeds": pooled, "time_ids": ids}
  condition = added and {name: tensor(x) for name, x in added.items()}
  with torch.no_grad():
    unet = theirs.unet.float()
    expected = array(unet(*map(tensor, inputs), added_cond_kwargs=condition).sample)
  got = jax.jit(ours.unet.apply)({"params": ours.params["unet"]}, *inputs, added)
  return float(np.abs(got - expected).max() / np.abs(expected).max())
