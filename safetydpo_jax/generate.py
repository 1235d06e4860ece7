"""Renders a CSV of prompts: `python -m safetydpo_jax.generate`.

The CSV has a column `prompt`, and may have `image` (file name to save under) and
`evaluation_seed`. Each row draws its initial noise from its own seed, so an image does
not depend on the batch it was rendered in. Images that exist are skipped. DDIM with
classifier-free guidance (`diffusion.py`, equations 4 and 5); no safety checker.
"""

import argparse
import csv
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image
from tqdm import tqdm

from safetydpo_jax import diffusion, sharding
from safetydpo_jax import lora as lora_lib
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats import loras, manifest
from safetydpo_jax.formats.pipeline import Pipeline, load_pipeline
from safetydpo_jax.models import clip

EXAMPLE = """example:
  python -m safetydpo_jax.generate --model sd15 --lora runs/hate \\
    --prompts prompts.csv --out images --steps 50 --guidance 7.5
"""


class Row(NamedTuple):
  """One image to render: where it goes, from what, from which noise."""

  file: Path
  prompt: str
  seed: int
  number: int


def read_prompts(file: Path, out: Path) -> list[Row]:
  """The rows of a prompts CSV, in order.

  Raises:
    InputError: if the file cannot be read, has no column `prompt`, an image name that
      leaves `out`, or a seed that is no whole number.
  """
  try:
    with open(file, newline="", encoding="utf-8") as lines:
      rows = list(csv.DictReader(lines))
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{file} is no readable prompts CSV: {error}") from error
  if not rows or rows[0].get("prompt") is None:
    raise InputError(f"{file} has no column `prompt` or no rows")
  out = out.resolve()
  result = []
  for number, row in enumerate(rows):
    name = row.get("image") or f"{number:07d}_0.png"
    path = (out / name).resolve()
    if not path.is_relative_to(out) or path == out:
      raise InputError(f"{file} row {number + 1}: image {name!r} leaves the out folder")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
      raise InputError(f"{file} row {number + 1}: image {name!r} is no .png or .jpg")
    seed = row.get("evaluation_seed") or number
    try:
      result.append(Row(path, row["prompt"] or "", int(seed), number))
    except ValueError:
      raise InputError(
        f"{file} row {number + 1}: evaluation_seed {seed!r} is no whole number"
      ) from None
  return result


def make_sampler(
  pipeline: Pipeline, steps: int, guidance: float, lora: Any, mesh: Any
) -> Any:
  """A jitted (params, latents, token ids, empty token ids) → images in [0, 1].

  latents are (n, h, w, c) standard normal float32, token ids a tuple of (n, 77) per
  text encoder; the images are (n, H, W, 3) float32. `lora` may be None.
  """
  rows, replicated = (
    NamedSharding(mesh, sharding.BATCH),
    NamedSharding(mesh, sharding.REPLICATED),
  )
  extra = {} if lora is None else {"lora": lora}

  def sample(params, latents, token_ids, empty_ids):
    encode = partial(clip.encode_text, pipeline.text_encoders, params)
    context, _ = encode(token_ids)
    null_context, _ = encode(empty_ids)

    def predict(latents, timesteps, context):
      variables = {"params": params["unet"], **extra}
      return pipeline.unet.apply(variables, latents, timesteps, context)

    guided = diffusion.guided(predict, context, null_context, guidance)
    clean = diffusion.sample_ddim(guided, pipeline.schedule, latents, steps)
    images = pipeline.vae.apply(
      {"params": params["vae"]}, clean / pipeline.scaling_factor, method="decode"
    )
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

  return jax.jit(
    sample,
    in_shardings=(replicated, rows, rows, rows),
    out_shardings=rows,
  )


def initial_noise(seeds: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal (n, *shape): each image's own draw, from its own seed (n,)."""
  return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def save_image(file: Path, image: np.ndarray) -> None:
  """Writes (H, W, 3) in [0, 1] through a temporary name."""
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(f".{os.getpid()}.{file.name}")
  Image.fromarray(np.round(image * 255).astype(np.uint8)).save(temporary, quality=95)
  os.replace(temporary, file)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.generate",
    description="Renders the prompts of a CSV, with or without LoRAs.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", required=True, metavar="M")
  parser.add_argument(
    "--lora", action="append", default=[], metavar="L[:SCALE]", help="may be repeated"
  )
  parser.add_argument("--prompts", required=True, type=Path, metavar="CSV")
  parser.add_argument("--out", required=True, type=Path, metavar="DIR")
  parser.add_argument("--steps", type=int, default=50)
  parser.add_argument("--guidance", type=float, default=7.5)
  parser.add_argument("--height", type=int, help="pixels; the model's own by default")
  parser.add_argument("--width", type=int)
  parser.add_argument(
    "--latents", type=Path, metavar="FILE.npy", help="initial noise (n, c, h, w)"
  )
  parser.add_argument("--batch_size", type=int, default=4, help="images per device")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  return parser.parse_args(arguments)


def load_loras(names: list[str], pipeline: Pipeline) -> Any:
  """The sum of the named LoRAs, or None without any."""
  trees = []
  for name, factor in map(loras.split_scale, names):
    tree, about = loras.load_lora(name)
    loras.check_fits(name, about, pipeline.fingerprint)
    lora_lib.check_shapes(pipeline.params["unet"], tree)
    trees.append(lora_lib.scale(tree, factor))
  return lora_lib.add(trees) if trees else None


def read_latents(file: Path, rows: int, shape: tuple[int, ...]) -> np.ndarray:
  """(n, c, h, w) in PyTorch's order → (n, h, w, c) float32, one for each row."""
  try:
    latents = np.load(file, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise InputError(f"{file} is no readable .npy file: {error}") from error
  height, width, channels = shape
  if latents.shape != (rows, channels, height, width):
    raise InputError(
      f"{file} has shape {latents.shape}; expected ({rows}, {channels}, {height}, "
      f"{width}), one (c, h, w) for each prompt"
    )
  return latents.transpose(0, 2, 3, 1).astype(np.float32)


def main(arguments: list[str] | None = None) -> None:
  """Reads, renders batch by batch, writes."""
  options = parse_arguments(arguments)
  sharding.initialize_hosts()
  rows = read_prompts(options.prompts, options.out)
  pipeline = load_pipeline(options.model, dtype=options.dtype)
  lora = load_loras(options.lora, pipeline)
  height = options.height or pipeline.resolution
  width = options.width or pipeline.resolution
  factor = pipeline.vae_scale
  if height % factor or width % factor:
    raise InputError(f"{height} × {width} pixels; expected multiples of {factor}")
  shape = (height // factor, width // factor, pipeline.latent_channels)
  latents = None
  if options.latents:
    latents = read_latents(options.latents, len(rows), shape)

  # Every host renders its own share with its own devices.
  mesh = sharding.make_mesh(devices=jax.local_devices())
  params = sharding.place(pipeline.params, NamedSharding(mesh, sharding.REPLICATED))
  sampler = make_sampler(pipeline, options.steps, options.guidance, lora, mesh)
  missing = [row for row in rows if not row.file.exists()]
  mine = missing[jax.process_index() :: jax.process_count()]
  size = options.batch_size * jax.local_device_count()
  progress = tqdm(total=len(mine), unit="image", disable=jax.process_index() > 0)
  for start in range(0, len(mine), size):
    batch = mine[start : start + size]
    padded = batch + batch[-1:] * (size - len(batch))
    numbers = np.array([row.number for row in padded])
    noise = (
      initial_noise(np.array([row.seed for row in padded], np.uint32), shape)
      if latents is None
      else latents[numbers]
    )
    token_ids = pipeline.tokenize([row.prompt for row in padded])
    images = sampler(params, noise, token_ids, pipeline.tokenize([""] * size))
    for row, image in zip(batch, np.asarray(images)):
      save_image(row.file, image)
    progress.update(len(batch))
  progress.close()
  if jax.process_index() == 0:
    manifest.write_json(
      options.out / "generate.json",
      {
        "base": {"name": options.model, "fingerprint": pipeline.fingerprint},
        "lora": options.lora,
        "prompts": str(options.prompts),
        "sampler": "ddim",
        "steps": options.steps,
        "guidance": options.guidance,
        "height": height,
        "width": width,
        "dtype": options.dtype,
        "versions": manifest.versions(),
      },
    )
    print(f"{len(rows)} images in {options.out}, {len(missing)} of them new")


if __name__ == "__main__":
  run_command(main)
