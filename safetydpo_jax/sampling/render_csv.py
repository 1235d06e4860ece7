"""Renders a prompts CSV (`data/prompts.py`) into a folder of images.

Each row draws its noise from its own seed, so an image does not depend on the batch it
was rendered in (`renderer.py`). Unless the options name a sampler, it is that of the
checkpoint's scheduler (`methods.py`). There is no safety checker. With `compare` the
base model renders the same rows from the same noise into OUT/base.

Prompts longer than the text encoder reads are cut, counted and reported, unless the
options ask for chunks; rows with as many chunks are rendered together
(`prompt_text.py`).

Existing images are kept and the missing ones rendered; a folder that holds images of
other settings is refused (`folders.py`).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from safetydpo_jax.data.prompts import PromptTable, Row, check_written, read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.configs import LARGEST_SIDE
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras.adapter import Adapter
from safetydpo_jax.formats.loras.load import load_adapters
from safetydpo_jax.runtime import files, hosts, sharding
from safetydpo_jax.runtime.command_line import Repeated
from safetydpo_jax.runtime.log import say
from safetydpo_jax.sampling import folders as folders_lib
from safetydpo_jax.sampling import methods, prompt_checks, text_settings
from safetydpo_jax.sampling.folders import BASE, Folder
from safetydpo_jax.sampling.inputs import (
  fix_prompts,
  make_inputs,
  read_index,
  read_latents,
)
from safetydpo_jax.sampling.renderer import (
  Inputs,
  fix_schedule,
  make_renderer,
  save_image,
)
from safetydpo_jax.sampling.settings import RenderSettings


@dataclasses.dataclass(frozen=True)
class RenderTask:
  """What is rendered, and where to."""

  model: str
  """a diffusers directory, a single file, a hub id, or toy, sd15, sd21, sdxl, …"""
  prompts: Path
  """CSV with a column `prompt`"""
  out: Path
  """folder for the images, generate.json and sheet.jpg"""
  lora: Repeated[tuple[str, ...]] = ()
  """L[:SCALE]: a run, a merge, a LoRA file or a hub id; may be repeated, LoRAs add
  up"""
  any_base: bool = False
  """take LoRAs of another base model, such as the one this is a fine-tune of"""


@dataclasses.dataclass(frozen=True)
class RenderOptions(RenderSettings, RenderTask):  # --help lists the task first
  """Renders the prompts of a CSV, with or without LoRAs."""

  compare: bool = False
  """also render without the LoRAs, into OUT/base"""
  latents: Path | None = None
  """.npy file of the initial noise, (n, c, h, w) (default: noise from the rows'
  seeds)"""
  batch_size: int = 4
  """images per device"""
  no_blur: bool = False
  """do not blur the contact sheet"""

  def __post_init__(self):
    super().__post_init__()
    if self.compare and not self.lora:
      raise InputError(
        "--compare renders with the LoRAs and without; it needs at least one --lora"
      )
    if self.batch_size < 1:
      raise InputError(f"--batch_size is {self.batch_size}; expected 1 or more")


def render_csv(options: RenderOptions) -> int:
  """Renders what is missing; returns the number of images, of both folders together.

  Every process of a job calls it; each renders its share of the rows.

  Raises:
    InputError: the CSV, the model, a LoRA or the latents cannot be read or do not fit
      together, or a folder cannot be used.
  """
  sharding.use_precision(options.dtype)
  table = read_table(options.prompts)
  say(*table.notes)
  check_written(table)
  options, table = leave_out_guidance(options, table)
  rows = table.in_folder(options.out)  # errors in the CSV come before the slow model
  prompts = prompt_checks.gather(options.prompts, rows, options)
  if prompts.changes:
    say(prompts.changes)
  pipeline = fix_schedule(
    load_pipeline(
      options.model,
      dtype=options.dtype,
      variant=options.variant,
      vae_from=options.vae,
    )
  )
  adapter = load_adapters(list(options.lora), pipeline, options.any_base)
  options = fill_from_checkpoint(options, pipeline)
  prompt_checks.check_guidance(options, rows, pipeline)
  shape = latent_shape(options, pipeline)
  latents = None
  if options.latents:
    latents = read_latents(options.latents, len(rows), shape)
  folders = [make_folder(options, options.out, rows, pipeline, adapter)]
  if options.compare:
    base = options.out / BASE
    folders.append(
      make_folder(options, base, table.in_folder(base), pipeline, adapters.of_lora({}))
    )
  folders_lib.check_names(folders)
  for folder in folders:
    files.make_folder(folder.path)
    folders_lib.check_same_settings(folder)
  hosts.wait_for_all("every host has seen the folders")
  if jax.process_index() == 0:
    for folder in folders:
      folders_lib.mark_incomplete(folder)
  cut = prompt_checks.find_cut(pipeline, prompts)
  say(*prompt_checks.notes(prompts, cut))
  prepare: Callable[[list[Row]], Inputs] = partial(
    make_inputs,
    pipeline=pipeline,
    shape=shape,
    latents=latents,
    guidance=options.guidance,
    negative_prompt=prompts.negative_prompt,
    style=options.prompt_style,
  )
  if options.fix_text:
    prepare = fix_prompts(prepare)
  chunks = prompt_checks.chunks_of(pipeline, prompts)
  render_share(options, pipeline, folders, prepare, chunks)
  hosts.wait_for_all("all images are there")
  if jax.process_index() == 0:
    write_summary(options, pipeline, folders, cut)
  return sum(len(set(folder.rows)) for folder in folders)


def leave_out_guidance(
  options: RenderOptions, table: PromptTable
) -> tuple[RenderOptions, PromptTable]:
  """The table as `no_row_guidance` has it; the option, where it made a difference."""
  if not options.no_row_guidance:
    return options, table
  differs = any(row.guidance is not None for row in table.rows)
  options = dataclasses.replace(options, no_row_guidance=differs)
  return options, table.without_guidance()


def fill_from_checkpoint(options: RenderOptions, pipeline: Pipeline) -> RenderOptions:
  """The options with the checkpoint's sampler, height and width where they name none.

  Raises:
    InputError: the size, the sampler or the number of steps does not fit the model.
  """
  sampler = options.sampler or methods.name_of(
    read_index(pipeline)["scheduler"][1], pipeline.schedule.config
  )
  options = dataclasses.replace(
    options,
    sampler=sampler,
    height=pipeline.image_size[0] if options.height is None else options.height,
    width=pipeline.image_size[1] if options.width is None else options.width,
  )
  for name in ("height", "width"):
    pixels = getattr(options, name)
    if not 1 <= pixels <= LARGEST_SIDE or pixels % pipeline.vae_scale:
      raise InputError(
        f"--{name} is {pixels}; expected a multiple of {pipeline.vae_scale} pixels, at "
        f"most {LARGEST_SIDE:,}"
      )
  methods.make_sampler(sampler, pipeline.schedule, options.steps)  # checks the steps
  text_settings.check_fits(options, pipeline)
  return options


def size_of(options: RenderOptions) -> tuple[int, int]:
  """(height, width) of an image, from options of `fill_from_checkpoint`."""
  assert options.height is not None
  assert options.width is not None
  return options.height, options.width


def latent_shape(options: RenderOptions, pipeline: Pipeline) -> tuple[int, int, int]:
  """(h, w, c) of one image's latents."""
  height, width = (side // pipeline.vae_scale for side in size_of(options))
  return height, width, pipeline.latent_channels


def make_folder(
  options: RenderOptions,
  path: Path,
  rows: list[Row],
  pipeline: Pipeline,
  adapter: Adapter,
) -> Folder:
  """A folder for `rows` rendered with an adapter, and what determines it.

  Args:
    options: of `fill_from_checkpoint`.
    path: the folder.
    rows: placed in it.
    pipeline: the base model.
    adapter: the LoRAs' sum, and what they change besides.
  """
  given = [options.latents.read_bytes()] if options.latents else []
  settings = {
    "base": pipeline.fingerprint,
    "lora_sha256": adapters.sha256(adapter),
    "prompts_sha256": folders_lib.hash_of_rows(rows, path),
    "latents_sha256": [hashlib.sha256(data).hexdigest() for data in given],
    "steps": options.steps,
    "guidance": options.guidance,
    "dtype": options.dtype,
    "height": options.height,
    "width": options.width,
    "sampler": options.sampler,
    "negative_prompt": options.negative_prompt,
    # None for what is neutral: folders from before an option do not have its field.
    "guidance_rescale": options.guidance_rescale or None,
    "no_row_guidance": options.no_row_guidance or None,
    "vae": pipeline.vae_fingerprint if options.vae else None,
    "fix_text": options.fix_text or None,
    "conditioning": text_settings.to_manifest(options, *size_of(options)),
  }
  return Folder(path, rows, adapter, settings)


def render_share(
  options: RenderOptions,
  pipeline: Pipeline,
  folders: list[Folder],
  prepare: Callable[[list[Row]], Inputs],
  chunks: dict[int, int],
) -> None:
  """Renders and saves this host's missing images, with this host's devices.

  `chunks` has each row's, by its number; those of one batch have as many.

  Which host renders a row depends on the CSV alone: which images exist changes while
  the hosts look.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices())
  replicated = NamedSharding(mesh, sharding.REPLICATED)
  unet, changed = pipeline.params["unet"], True
  others = {name: tree for name, tree in pipeline.params.items() if name != "unet"}
  params = sharding.place(others, replicated)
  assert options.sampler is not None  # of `fill_from_checkpoint`
  renderer = make_renderer(
    pipeline,
    options.sampler,
    options.steps,
    options.guidance_rescale,
    mesh,
    text_settings.clip_skips(options),
    text_settings.time_ids(options, *size_of(options)),
  )
  host, count = jax.process_index(), jax.process_count()
  shares = [
    [row for row in list(dict.fromkeys(f.rows))[host::count] if not row.file.exists()]
    for f in folders
  ]
  devices = jax.local_device_count()
  with tqdm(total=sum(map(len, shares)), unit="image", disable=host > 0) as progress:
    for folder, todo in zip(folders, shares):
      lora = sharding.place(folder.adapter.lora, replicated)
      if changed or folder.adapter.rest:
        params.pop("unet", None)  # two would not fit beside each other
        folded = adapters.fold(unet, folder.adapter.rest)
        params["unet"] = sharding.place(folded, replicated)
        changed = bool(folder.adapter.rest)
      render = partial(renderer, params, lora)
      for length in sorted({chunks[row.number] for row in todo}):
        alike = [row for row in todo if chunks[row.number] == length]
        size = devices * min(options.batch_size, -(-len(alike) // devices))
        for row, image in render_rows(alike, size, render, prepare):
          save_image(row.file, image)
          progress.update()


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


def write_summary(
  options: RenderOptions,
  pipeline: Pipeline,
  folders: list[Folder],
  cut: dict[str, int] | None,
) -> None:
  """The contact sheet, the manifests, and a printed line for each folder."""
  folders_lib.write_contact_sheet(folders, blur=not options.no_blur)
  for folder in folders:
    about = {
      "model": pipeline.name,
      "lora": list(options.lora) if any(folder.adapter) else [],
      "prompts": str(options.prompts),
      **({"cut_prompts": cut} if cut else {}),
    }
    count = folders_lib.mark_complete(folder, about)
    print(f"{count} images in {folder.path}")
