"""Renders a CSV of prompts: `python -m safetydpo_jax.generate`.

Each row of the CSV (`data/prompts.py`) draws its initial noise from its own seed, so an
image does not depend on the batch it was rendered in. DDIM with classifier-free
guidance (`diffusion.py`, equations 4 and 5); no safety checker.

Images that exist are skipped. So that they belong together, what decides them is kept
in DIR/plan.json until all are there and then in DIR/generate.json; a command that would
render other images there is refused.
"""

import argparse
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from PIL import Image
from tqdm import tqdm

from safetydpo_jax import diffusion, sharding
from safetydpo_jax import lora as lora_lib
from safetydpo_jax.data.prompts import Row, read_prompts
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats import loras, manifest
from safetydpo_jax.formats.pipeline import Pipeline, load_pipeline
from safetydpo_jax.models import clip

EXAMPLE = """example:
  python -m safetydpo_jax.generate --model sd15 --lora runs/hate \\
    --prompts prompts.csv --out images --steps 50 --guidance 7.5
"""


MANIFEST = "generate.json"
PLAN = "plan.json"


def make_sampler(pipeline: Pipeline, steps: int, guidance: float, mesh: Any) -> Any:
  """A jitted (params, lora, latents, token ids, empty token ids) → images in [0, 1].

  lora is a LoRA tree, {} for none; latents are (n, h, w, c) standard normal float32,
  token ids a tuple of (n, 77) per text encoder; the images are (n, H, W, 3) float32.
  """
  rows, replicated = (
    NamedSharding(mesh, sharding.BATCH),
    NamedSharding(mesh, sharding.REPLICATED),
  )

  def sample(params, lora, latents, token_ids, empty_ids):
    encode = partial(clip.encode_text, pipeline.text_encoders, params)
    context, _ = encode(token_ids)
    null_context, _ = encode(empty_ids)

    def predict(latents, timesteps, context):
      variables = {"params": params["unet"], "lora": lora}
      return pipeline.unet.apply(variables, latents, timesteps, context)

    guided = diffusion.guided(predict, context, null_context, guidance)
    clean = diffusion.sample_ddim(guided, pipeline.schedule, latents, steps)
    images = pipeline.vae.apply(
      {"params": params["vae"]}, clean / pipeline.scaling_factor, method="decode"
    )
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

  return jax.jit(
    sample,
    in_shardings=(replicated, replicated, rows, rows, rows),
    out_shardings=rows,
  )


def initial_noise(seeds: list[int], shape: tuple[int, ...]) -> jax.Array:
  """Standard normal (n, *shape): each image's own draw, from its own seed.

  All 64 bits of a seed count, as the two words of a threefry key; for those below 2³²
  that is `jax.random.key(seed)`.
  """
  words = [divmod(seed % 2**64, 2**32) for seed in seeds]
  keys = jax.random.wrap_key_data(jnp.array(words, jnp.uint32), impl="threefry2x32")
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def save_image(file: Path, image: np.ndarray) -> None:
  """Writes (H, W, 3) in [0, 1] through a temporary name.

  Raises:
    InputError: if the image is not finite, or cannot be written.
  """
  if not np.isfinite(image).all():
    raise InputError(f"{file} would be NaN or infinity; use --dtype float32")
  temporary = file.with_name(f".{os.getpid()}.{file.name}")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(image * 255).astype(np.uint8)).save(temporary, quality=95)
    os.replace(temporary, file)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise InputError(f"cannot write {file}: {error.strerror or error}") from error


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
  parser.add_argument("--variant", help='of the model\'s files, for example "fp16"')
  sharding.add_host_arguments(parser)
  return parser.parse_args(arguments)


def load_loras(names: list[str], pipeline: Pipeline) -> dict:
  """The sum of the named LoRAs, {} without any."""
  trees = []
  for name, factor in map(loras.split_scale, names):
    tree, about = loras.load_lora(name)
    loras.check_fits(name, about, pipeline.fingerprint)
    lora_lib.check_shapes(pipeline.params["unet"], tree)
    trees.append(lora_lib.scale(tree, factor))
  return lora_lib.add(trees)


def read_latents(file: Path, rows: int, shape: tuple[int, ...]) -> np.ndarray:
  """(n, c, h, w) in PyTorch's order → (n, h, w, c) float32, one for each row."""
  try:
    latents = np.load(file, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"{file} is no readable .npy file: {error}") from error
  if not isinstance(latents, np.ndarray) or latents.dtype.kind != "f":
    raise InputError(f"{file} is no .npy file of floating point numbers")
  height, width, channels = shape
  if latents.shape != (rows, channels, height, width):
    raise InputError(
      f"{file} has shape {latents.shape}; expected ({rows}, {channels}, {height}, "
      f"{width}), one (c, h, w) for each prompt"
    )
  return latents.transpose(0, 2, 3, 1).astype(np.float32)


def check_options(options: argparse.Namespace, pipeline: Pipeline) -> tuple[int, ...]:
  """Refuses numbers that make no picture; returns the latents' shape (h, w, c)."""
  factor = pipeline.vae_scale
  for name in ("height", "width"):
    pixels = getattr(options, name)
    if pixels is None:
      setattr(options, name, pipeline.resolution)
    elif pixels < 1 or pixels % factor:
      raise InputError(f"--{name} is {pixels}; expected a multiple of {factor} pixels")
  if options.batch_size < 1:
    raise InputError(f"--batch_size is {options.batch_size}; expected 1 or more")
  diffusion.sampling_timesteps(pipeline.schedule, options.steps)
  size = (options.height // factor, options.width // factor)
  return (*size, pipeline.latent_channels)


def make_settings(
  options: argparse.Namespace, pipeline: Pipeline, lora: dict, rows: list[Row]
) -> dict[str, Any]:
  """What decides the images."""
  factors = hashlib.sha256()
  for path, leaf in sorted(flatten_dict(lora).items()):
    factors.update(f"{path} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
  out = options.out.resolve()
  texts = [(str(r.file.relative_to(out)), r.prompt, r.seed) for r in rows]
  files = [options.latents.read_bytes()] if options.latents else []
  return {
    "base": pipeline.fingerprint,
    "lora_sha256": factors.hexdigest(),
    "prompts_sha256": hashlib.sha256(repr(texts).encode()).hexdigest(),
    "latents_sha256": [hashlib.sha256(data).hexdigest() for data in files],
    **{name: getattr(options, name) for name in ("steps", "guidance", "dtype")},
    **{name: getattr(options, name) for name in ("height", "width")},
    "sampler": "ddim",
  }


def check_out(out: Path, settings: dict[str, Any], rows: list[Row]) -> None:
  """Makes `out`, and refuses it if its images were made with other settings."""
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
  plan = next((out / n for n in (MANIFEST, PLAN) if (out / n).is_file()), None)
  foreign = next((row.file for row in rows if row.file.exists()), None)
  if foreign and not plan:
    raise InputError(
      f"{foreign} is there, but nothing says what made it; choose another --out"
    )
  before = manifest.read_json(plan, "folder of images") if plan else settings
  for name, value in settings.items():
    if before.get(name) != value:
      raise InputError(
        f"{out} holds images with {name} {before.get(name)!r}, now it is {value!r}; "
        f"choose another --out, or delete its images and {plan.name}"
      )


def main(arguments: list[str] | None = None) -> None:
  """Reads, renders batch by batch, writes."""
  options = parse_arguments(arguments)
  sharding.initialize_hosts()
  sharding.use_precision(options.dtype)
  rows = read_prompts(options.prompts, options.out)
  pipeline = load_pipeline(options.model, dtype=options.dtype, variant=options.variant)
  lora = load_loras(options.lora, pipeline)
  shape = check_options(options, pipeline)
  latents = None
  if options.latents:
    latents = read_latents(options.latents, len(rows), shape)
  settings = make_settings(options, pipeline, lora, rows)
  check_out(options.out, settings, rows)
  sharding.wait_for_hosts("every host has seen the folder")
  if jax.process_index() == 0:
    manifest.write_json(options.out / PLAN, settings)
    (options.out / MANIFEST).unlink(missing_ok=True)

  # Every host renders its own share with its own devices. A row's host is a function of
  # the CSV alone: what exists changes while the hosts look.
  mesh = sharding.make_mesh(devices=jax.local_devices())
  params, lora = sharding.place(
    (pipeline.params, lora), NamedSharding(mesh, sharding.REPLICATED)
  )
  sampler = make_sampler(pipeline, options.steps, options.guidance, mesh)
  unique = list(dict.fromkeys(rows))
  share = unique[jax.process_index() :: jax.process_count()]
  todo = [row for row in share if not row.file.exists()]
  devices = jax.local_device_count()
  size = devices * min(options.batch_size, -(-len(todo) // devices))
  progress = tqdm(total=len(todo), unit="image", disable=jax.process_index() > 0)
  for start in range(0, len(todo), size or 1):
    batch = todo[start : start + size]
    padded = batch + batch[-1:] * (size - len(batch))
    noise = (
      initial_noise([row.seed for row in padded], shape)
      if latents is None
      else latents[np.array([row.number for row in padded])]
    )
    token_ids = pipeline.tokenize([row.prompt for row in padded])
    empty_ids = pipeline.tokenize([""] * size)
    images = sampler(params, lora, noise, token_ids, empty_ids)
    for row, image in zip(batch, np.asarray(images)):
      save_image(row.file, image)
    progress.update(len(batch))
  progress.close()
  sharding.wait_for_hosts("all images are there")

  if jax.process_index() == 0:
    manifest.write_json(
      options.out / MANIFEST,
      {
        **settings,
        "model": pipeline.name,
        "lora": options.lora,
        "prompts": str(options.prompts),
        "images": len(unique),
        "versions": manifest.versions(),
      },
    )
    (options.out / PLAN).unlink()
    print(f"{len(unique)} images in {options.out}")


if __name__ == "__main__":
  run_command(main)
