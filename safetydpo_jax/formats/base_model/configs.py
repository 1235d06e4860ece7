"""A checkpoint's config.json files and scheduler_config.json, corrected where old."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.core import FrozenDict

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import old_files
from safetydpo_jax.models import vae
from safetydpo_jax.models.config import freeze
from safetydpo_jax.runtime.manifest import read_json

DEEPEST = 20  # levels of JSON; published files have 4
LARGEST_SIDE = 16_384  # pixels; no memory holds the UNet's attention over more


class Configs(NamedTuple):
  """A checkpoint's settings, see `old_files.py`.

  Attributes:
    components: {component: config.json}, frozen.
    scheduler: scheduler_config.json.
  """

  components: dict[str, FrozenDict[str, Any]]
  scheduler: dict[str, Any]


def read_configs(
  folders: Mapping[str, Path], scheduler: Path, encoders: Mapping[str, str]
) -> Configs:
  """Reads the settings, without a look at most of what they say.

  Args:
    folders: of 'unet', 'vae' and the text encoders.
    scheduler: the folder of scheduler_config.json.
    encoders: {text encoder: its class}; two mean SDXL's family.

  Raises:
    InputError: a file is missing or is not a JSON object.
  """
  files = {name: folders[name] / "config.json" for name in ("unet", "vae", *encoders)}
  found = {name: _read(file, f"{name} folder") for name, file in files.items()}
  found["unet"] = old_files.correct_unet(
    found["unet"], str(files["unet"]), xl=len(encoders) > 1
  )
  found["vae"] = old_files.correct_vae(found["vae"], str(files["vae"]))
  for name, kind in encoders.items():
    found[name] = old_files.correct_text_encoder(found[name], str(files[name]), kind)
  file = scheduler / "scheduler_config.json"
  return Configs(
    {name: freeze(config) for name, config in found.items()},
    old_files.correct_scheduler(_read(file, "scheduler"), str(file)),
  )


def _read(file: Path, what: str) -> dict[str, Any]:
  content = read_json(file, what)
  if not isinstance(content, dict):
    raise InputError(f"{file} holds {type(content).__name__}, expected a JSON object")
  level = [content]
  for _ in range(DEEPEST):
    level = [item for value in level for item in _items(value)]
  if level:  # no function here counts on more
    raise InputError(f"{file} is nested deeper than {DEEPEST} levels; fetch it again")
  return content


def _items(value: Any) -> Iterable[Any]:
  if isinstance(value, dict):
    return value.values()
  return value if isinstance(value, list) else ()


def image_size(
  unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]
) -> tuple[int, int]:
  """(height, width) in pixels that a UNet was trained for; 64 latents by default.

  Raises:
    InputError: `sample_size` is not a size.
  """
  size, scale = unet_config.get("sample_size"), vae.pixels_per_latent(vae_config)
  if size is None:
    size, scale = vae_config.get("sample_size", 64 * scale), 1
  sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
  if len(sides) != 2 or not all(
    type(side) is int and 0 < side * scale <= LARGEST_SIDE for side in sides
  ):
    raise InputError(
      f"UNet config: sample_size = {size!r} is not supported, only a positive integer, "
      f"or two for height and width, of at most {LARGEST_SIDE:,} pixels"
    )
  return sides[0] * scale, sides[1] * scale
