"""Renders a CSV of prompts: `python -m safetydpo_jax.generate`.

Each row of the CSV (`data/prompts.py`) draws its noise from its own seed, so an image
does not depend on the batch it was rendered in (`sampling/renderer.py`). The sampler is
the one of the checkpoint's scheduler unless --sampler names another (`sampling/`); no
safety checker. With --compare the base model renders the same rows from the same noise
into DIR/base.

Images that exist are skipped. So that they belong together, what decides them is kept
in DIR/plan.json until all are there and then in DIR/generate.json; a command that would
render other images there is refused. DIR/sheet.jpg shows some of them, blurred.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.data.prompts import Row, read_prompts
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.loras.load import load_loras
from safetydpo_jax.runtime import hosts, manifest, sharding
from safetydpo_jax.sampling.folders import (
  BASE,
  Folder,
  begin,
  check,
  check_names,
  complete,
  hash_of_rows,
  write_sheet,
)
from safetydpo_jax.sampling.methods import METHODS, make_sampler, name_of
from safetydpo_jax.sampling.renderer import (
  Inputs,
  initial_noise,
  key_words,
  make_renderer,
  mend_schedule,
  save_image,
)

EXAMPLE = """example:
  python -m safetydpo_jax.generate --model sd15 --lora runs/hate \\
    --prompts prompts.csv --out images --steps 50 --guidance 7.5
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.generate",
    description="Renders the prompts of a CSV, with or without LoRAs.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--model", required=True, metavar="M", help="directory, hub id, sd15, sdxl, …")
  add(
    "--lora",
    action="append",
    default=[],
    metavar="L[:SCALE]",
    help="a run, a merge or a LoRA file; may be repeated: their sum",
  )
  add("--prompts", required=True, type=Path, metavar="CSV", help="column prompt")
  add("--out", required=True, type=Path, metavar="DIR", help="images, generate.json")
  add("--compare", action="store_true", help="also without the LoRAs, in DIR/base")
  add("--sampler", choices=METHODS, help="(default: the checkpoint's)")
  add("--steps", type=int, default=50, help="of the sampler (default: 50)")
  add(
    "--guidance",
    type=float,
    default=7.5,
    help="1 or less is none; evaluation_guidance in the CSV wins (default: 7.5)",
  )
  add("--guidance_rescale", type=float, default=0.0, metavar="PHI", help="0 to 1")
  add("--negative_prompt", help="negative_prompt in the CSV wins (default: none)")
  add("--height", type=int, help="pixels; the model's own by default")
  add("--width", type=int, help="the same")
  add("--latents", type=Path, metavar="FILE.npy", help="initial noise (n, c, h, w)")
  add("--batch_size", type=int, default=4, help="images per device (default: 4)")
  add("--dtype", default="float32", choices=["float32", "bfloat16"])
  add("--variant", help='of the model\'s files, for example "fp16"')
  add("--no_blur", action="store_true", help="show the sheet's images sharply")
  hosts.add_arguments(parser)
  return parser.parse_args(arguments)


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
  """Refuses what makes no picture and fills defaults; the latents' shape (h, w, c)."""
  factor = pipeline.vae_scale
  for name in ("height", "width"):
    pixels = getattr(options, name)
    if pixels is None:
      setattr(options, name, pipeline.resolution)
    elif pixels < 1 or pixels % factor:
      raise InputError(f"--{name} is {pixels}; expected a multiple of {factor} pixels")
  if options.batch_size < 1:
    raise InputError(f"--batch_size is {options.batch_size}; expected 1 or more")
  if not np.isfinite(options.guidance):
    raise InputError(f"--guidance is {options.guidance}; expected a finite number")
  if not 0 <= options.guidance_rescale <= 1:
    raise InputError(
      f"--guidance_rescale is {options.guidance_rescale}; expected 0 to 1"
    )
  if options.sampler is None:
    options.sampler = name_of(read_index(pipeline)["scheduler"][1])
  make_sampler(options.sampler, pipeline.schedule, options.steps)
  size = (options.height // factor, options.width // factor)
  return (*size, pipeline.latent_channels)


def read_index(pipeline: Pipeline) -> dict[str, Any]:
  """model_index.json, which decides in diffusers; DDIM if nothing names a scheduler."""
  index = manifest.read_json(pipeline.path / "model_index.json", "diffusers directory")
  named = pipeline.schedule.config.get("_class_name", "DDIMScheduler")
  return {"scheduler": ["diffusers", named], **index}


def make_folder(
  options: argparse.Namespace, path: Path, pipeline: Pipeline, lora: dict
) -> Folder:
  """The images of the CSV with a LoRA ({} for none), and what decides them."""
  rows = read_prompts(options.prompts, path)
  files = [options.latents.read_bytes()] if options.latents else []
  settings = {
    "base": pipeline.fingerprint,
    "lora_sha256": lora_lib.factors_sha256(lora),
    "prompts_sha256": hash_of_rows(rows, path),
    "latents_sha256": [hashlib.sha256(data).hexdigest() for data in files],
    **{name: getattr(options, name) for name in ("steps", "guidance", "dtype")},
    **{name: getattr(options, name) for name in ("height", "width")},
    **{name: getattr(options, name) for name in ("sampler", "negative_prompt")},
    "guidance_rescale": options.guidance_rescale or None,  # once there was none
  }
  return Folder(path, rows, lora, settings)


def make_inputs(
  options: argparse.Namespace,
  pipeline: Pipeline,
  rows: list[Row],
  latents: np.ndarray | None,
  shape: tuple[int, ...],
) -> Inputs:
  """What decides the images of a batch; `latents` are those of the whole CSV."""
  negatives = [
    options.negative_prompt if row.negative_prompt is None else row.negative_prompt
    for row in rows
  ]
  # diffusers' StableDiffusionXLPipeline: no negative prompt means embeddings of zeros.
  zeros = len(pipeline.text_encoders) > 1 and read_index(pipeline).get(
    "force_zeros_for_empty_prompt", True
  )
  guidance = [
    options.guidance if row.guidance is None else row.guidance for row in rows
  ]
  seeds = [row.seed for row in rows]
  return Inputs(
    latents=initial_noise(seeds, shape)
    if latents is None
    else latents[np.array([row.number for row in rows])],
    words=key_words(seeds),
    token_ids=pipeline.tokenize([row.prompt for row in rows]),
    negative_ids=pipeline.tokenize([text or "" for text in negatives]),
    negative=np.array([not (zeros and t is None) for t in negatives], np.float32),
    guidance=np.maximum(np.array(guidance, np.float32), 1.0),  # as diffusers: 1 is none
  )


def render_rows(
  todo: list[Row],
  size: int,
  render: Callable[[Inputs], jax.Array],
  prepare: Callable[[list[Row]], Inputs],
) -> Iterator[tuple[Row, np.ndarray]]:
  """Each row with its image (H, W, 3), rendered `size` at a time."""
  for start in range(0, len(todo), size):
    batch = todo[start : start + size]
    padded = batch + batch[-1:] * (size - len(batch))
    yield from zip(batch, np.asarray(render(prepare(padded))))


def main(arguments: list[str] | None = None) -> None:
  """Reads, renders batch by batch, writes."""
  options = parse_arguments(arguments)
  if options.compare and not options.lora:
    raise InputError("--compare sets images beside the base model's; it needs --lora")
  hosts.initialize()
  sharding.use_precision(options.dtype)
  rows = read_prompts(options.prompts, options.out)  # first: the model takes long
  pipeline = mend_schedule(
    load_pipeline(options.model, dtype=options.dtype, variant=options.variant)
  )
  lora = load_loras(options.lora, pipeline)
  shape = check_options(options, pipeline)
  latents = None
  if options.latents:
    latents = read_latents(options.latents, len(rows), shape)
  trees = {options.out: lora}
  if options.compare:
    trees[options.out / BASE] = {}
  folders = [make_folder(options, path, pipeline, tree) for path, tree in trees.items()]
  check_names(folders)
  for folder in folders:
    check(folder)
  hosts.wait_for_all("every host has seen the folders")
  if jax.process_index() == 0:
    for folder in folders:
      begin(folder)

  # Every host renders its own share with its own devices. A row's host is a function of
  # the CSV alone: what exists changes while the hosts look.
  mesh = sharding.make_mesh(devices=jax.local_devices())
  replicated = NamedSharding(mesh, sharding.REPLICATED)
  params = sharding.place(pipeline.params, replicated)
  renderer = make_renderer(
    pipeline, options.sampler, options.steps, options.guidance_rescale, mesh
  )
  host, count = jax.process_index(), jax.process_count()
  shares = [
    [row for row in list(dict.fromkeys(f.rows))[host::count] if not row.file.exists()]
    for f in folders
  ]
  devices = jax.local_device_count()
  with tqdm(total=sum(map(len, shares)), unit="image", disable=host > 0) as progress:
    for folder, todo in zip(folders, shares):
      lora = sharding.place(folder.lora, replicated)
      size = devices * min(options.batch_size, -(-len(todo) // devices))
      images = render_rows(
        todo,
        size or 1,
        partial(renderer, params, lora),
        lambda rows: make_inputs(options, pipeline, rows, latents, shape),
      )
      for row, image in images:
        save_image(row.file, image)
        progress.update()
  hosts.wait_for_all("all images are there")

  if jax.process_index() == 0:
    write_sheet(folders, blur=not options.no_blur)
    for folder in folders:
      loras_used = options.lora if folder.lora else []
      about = {"model": pipeline.name, "lora": loras_used}
      about["prompts"] = str(options.prompts)
      count = complete(folder, about)
      print(f"{count} images in {folder.path}")


if __name__ == "__main__":
  run_command(main)
