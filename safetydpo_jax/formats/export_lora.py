"""A LoRA → files for PyTorch, with a model card and a record of what made them.

  diffusers  pytorch_lora_weights.safetensors, which `load_lora_weights` reads
  kohya      safetydpo_lora.safetensors, which A1111, Forge and ComfyUI read
  pipeline   a diffusers directory with the LoRA in the UNet's weights
  single_file  safetydpo_model.safetensors, the same in one file: ComfyUI, A1111, Forge

Beside each: README.md, the model card, and export.json, which says what the files were
made from. What they hold: `loras/write.py`, `loras/kohya.py`, `base_model/fused.py`,
`base_model/write_single_file.py`, `model_card.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import model_card, verify
from safetydpo_jax.formats.base_model import fused, hub
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.base_model.single_file_networks import UNET
from safetydpo_jax.formats.base_model.write_directory import write_directory
from safetydpo_jax.formats.base_model.write_single_file import FILE, write_single_file
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras import kohya
from safetydpo_jax.formats.loras.adapter import Adapter
from safetydpo_jax.formats.loras.load import check_fits, load_adapter, split_scale
from safetydpo_jax.formats.loras.write import (
  DTYPES,
  FILE_NAME,
  target_modules,
  write_diffusers,
  write_kohya,
)
from safetydpo_jax.formats.tensors import open_safetensors
from safetydpo_jax.lora import rank_of
from safetydpo_jax.runtime import manifest

# A file that only this format has.
OWN_FILES = {
  "diffusers": FILE_NAME,
  "kohya": kohya.FILE_NAME,
  "pipeline": "model_index.json",
  "single_file": FILE,
}
CARD = "README.md"
ABOUT = "export.json"
# Components that have weights, or settings, to fetch.
_FETCHED = (
  "vae",
  "text_encoder",
  "text_encoder_2",
  "safety_checker",
  "image_encoder",
)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """Exports a LoRA for PyTorch."""

  lora: str
  """L or L:SCALE: a run directory, a merged directory, a LoRA file or a hub id"""
  model: str
  """the base model"""
  out: Path
  """folder to write to"""
  format: Literal["diffusers", "kohya", "pipeline", "single_file"] = "diffusers"
  """a LoRA for diffusers, a LoRA for A1111 and ComfyUI, or the whole model with the
  LoRA in its weights: a diffusers directory, or a checkpoint for A1111 and ComfyUI"""
  dtype: Literal["float32", "float16", "bfloat16"] | None = None
  """number type (default: float32 for a LoRA, the base model's for a whole model)"""
  variant: str | None = None
  """variant of the model's files, such as fp16"""
  any_base: bool = False
  """take a LoRA of another base model, such as the one this is a fine-tune of"""
  figures: Path | None = None
  """the figures.json that `evaluate` wrote, for the model card"""
  verify: bool = False
  """load the result in PyTorch and compare predictions"""
  push: str | None = None
  """hub repository to upload the result to; a new one is private"""


class Source(NamedTuple):
  """What is exported: an adapter, scaled, the model it is for, and what made it.

  Attributes:
    adapter: the LoRA, and what it changes besides; nothing, but for a pipeline.
    about: expert.json, {} if there is none.
    base: the base model; no weights are loaded.
  """

  adapter: Adapter
  about: dict[str, Any]
  base: Pipeline


def export_lora(options: ExportOptions) -> None:
  """Reads the LoRA, checks it against the model, and writes it.

  Raises:
    InputError: the LoRA does not fit the model, the files cannot be written, --verify
      finds other predictions, or the hub refuses the upload.
  """
  if options.verify:
    verify.check_installed()
  figures = model_card.read_figures(options.figures) if options.figures else ""
  whole = options.format in WHOLE
  if not whole:
    check_only_format(options)
  source = read_source(options)
  if whole:
    with fused.new_folder(options.out) as folder:
      files = WHOLE[options.format](folder, source, options)
      dtype = options.dtype or float_type(files[0])
      name = files[0].name if options.format == "single_file" else None
      describe(folder, name, dtype, source, figures, options)
  else:
    dtype = options.dtype or "float32"
    files = [write_lora(options.out, dtype, source, options)]
    describe(options.out, files[0].name, dtype, source, figures, options)
  rank = rank_of(source.adapter.lora)
  print(
    f"{options.out}: {', '.join(file.name for file in files)}; "
    + (f"rank {rank}, " if rank else "")
    + f"{adapters.num_parameters(source.adapter):,} parameters, {dtype}"
  )
  if options.verify:
    pipeline = options.format == "pipeline"
    result = options.out if pipeline else options.out / files[0].name
    lora, rest = source.adapter
    found = verify.compare(
      source.base,
      lora,
      result,
      fold=lambda params: adapters.fold(params, rest),
      fused=whole,
      variant=options.variant if whole else source.base.variant,
    )
    print(found.describe())
    verify.check(found, dtype)
  if options.push:
    push(options.out, options.push, None if whole else [files[0].name, CARD])


def check_only_format(options: ExportOptions) -> None:
  """Refuses a folder that holds an export in another format.

  Readers would take either, and the card would describe one of them.

  Raises:
    InputError: naming the file.
  """
  for name, file in OWN_FILES.items():
    if name != options.format and (options.out / file).exists():
      raise InputError(
        f"--out {options.out} holds an export for {name} ({file}); choose another "
        "--out, or delete it"
      )


def read_source(options: ExportOptions) -> Source:
  """The LoRA and its base model.

  Raises:
    InputError: there is none, or they do not fit each other.
  """
  name, factor = split_scale(options.lora)
  if options.format in WHOLE:
    hub.locate(options.model, _FETCHED, options.variant, None)
  base = load_pipeline(options.model, components=(), variant=options.variant)
  adapter, about = load_adapter(name, base.unet.config)
  check_fits(name, about, base.fingerprint, options.any_base)
  adapters.check_shapes(base.unet_shapes(), adapter)
  adapter = adapters.scale(adapter, factor)
  if options.format not in WHOLE:
    adapter = adapters.of_lora(adapters.as_lora(adapter, name))
  return Source(adapter, about, base)


def write_lora(out: Path, dtype: str, source: Source, options: ExportOptions) -> Path:
  """Writes the LoRA file and returns its path.

  Raises:
    InputError: it cannot be written, or a number does not fit `dtype`.
  """
  lora, base = source.adapter.lora, source.base
  shapes = base.unet_shapes()
  to = {"shapes": shapes, "dtype": DTYPES[dtype]}
  match options.format:
    case "diffusers":
      return write_diffusers(out, lora, target_modules(lora, shapes), **to)
    case "kohya":
      header = kohya.header(
        base.unet.config,
        base.schedule.prediction_type,
        base.resolution,
        rank_of(lora),
        f"SafetyDPO {source.about.get('category') or 'LoRA'}",
      )
      sgm = kohya.writes_sgm(base.unet.config)
      return write_kohya(out, lora, header, sgm=sgm, **to)
  raise ValueError(f"{options.format} is not a format of a LoRA file")


def write_pipeline(out: Path, source: Source, options: ExportOptions) -> list[Path]:
  """Writes the fused pipeline and returns the UNet's files.

  Raises:
    InputError: it cannot be written.
  """
  adapter, _, base = source
  changes = adapters.torch_changes(adapter.rest)
  dtype = options.dtype and DTYPES[options.dtype]
  if base.single:
    return write_directory(
      out, base, base.single, adapter.lora, changes=changes, dtype=dtype
    )
  fused.copy_base(base.path, out)
  return fused.write_unet(
    out, base.path, adapter.lora, changes=changes, variant=base.variant, dtype=dtype
  )


def write_checkpoint(out: Path, source: Source, options: ExportOptions) -> list[Path]:
  """Writes the fused model as one file and returns it.

  Raises:
    InputError: it cannot be written, or the model has no place in such a file.
  """
  adapter, about, base = source
  header = kohya.model_spec(
    base.unet.config,
    base.schedule.prediction_type,
    base.resolution,
    f"SafetyDPO {about.get('category') or 'safety'}",
  )
  write_single_file(
    out / FILE,
    base,
    adapter.lora,
    header,
    changes=adapters.torch_changes(adapter.rest),
    variant=options.variant,
    dtype=options.dtype and DTYPES[options.dtype],
  )
  return [out / FILE]


# The formats of a whole model, and what writes them.
WHOLE = {"pipeline": write_pipeline, "single_file": write_checkpoint}


def float_type(file: Path) -> str:
  """The number type of a fused UNet, which takes it from its base.

  Args:
    file: one of the UNet's files, or a single file.
  """
  tensors, _ = open_safetensors(file)
  unet = [x for name, x in tensors.items() if name.startswith(UNET)]
  names = {tensor.dtype.name for tensor in unet or tensors.values()}
  return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def describe(
  folder: Path,
  file: str | None,
  dtype: str,
  source: Source,
  figures: str,
  options: ExportOptions,
) -> None:
  """Writes export.json and the model card.

  Args:
    folder: the export's.
    file: the name of the LoRA file or the single file, None for a pipeline.
    dtype: of the numbers written.
    source: what was exported.
    figures: the card's tables, see `model_card.read_figures`.
    options: the export's.

  Raises:
    InputError: they cannot be written.
  """
  adapter, about, base = source
  card = model_card.Export(
    kind=options.format,
    file=file,
    base=options.model,
    fingerprint=base.fingerprint,
    variant=options.variant,
    about=about,
    rank=rank_of(adapter.lora) or None,
    parameters=adapters.num_parameters(adapter),
    dtype=dtype,
    repository=options.push,
    pipeline=str(base.index.get("_class_name", "StableDiffusionPipeline")),
  )
  model_card.write_card(folder / CARD, card, figures)
  manifest.write_json(
    folder / ABOUT,
    {
      "lora": options.lora,
      "format": options.format,
      "dtype": dtype,
      "about": about,
      "base": {"name": options.model, "fingerprint": base.fingerprint},
      "versions": manifest.versions(),
    },
  )


def push(folder: Path, repository: str, names: list[str] | None) -> None:
  """Uploads an export to the hub.

  export.json is never uploaded: it names folders of this machine. A new repository is
  private, since a publication cannot be taken back.

  Args:
    folder: the export's.
    repository: hub id.
    names: the files to upload; None: all, if the folder was new. A LoRA may have been
      written into a run's directory, or beside other files that are private.

  Raises:
    InputError: the hub refuses it.
  """
  # Imported here: it takes a second, and most exports are not uploaded.
  import huggingface_hub
  from huggingface_hub.errors import HfHubHTTPError

  hub_client = huggingface_hub.HfApi()
  try:
    hub_client.create_repo(repository, private=True, exist_ok=True)
    hub_client.upload_folder(
      repo_id=repository,
      folder_path=folder,
      allow_patterns=names,
      ignore_patterns=[ABOUT],
      commit_message="SafetyDPO export",
    )
  except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(
      f"could not push {folder} to {repository} ({reason}); log in with `hf auth "
      "login` and check the name; the export itself is complete"
    ) from error
  print(f"pushed to https://huggingface.co/{repository}")
