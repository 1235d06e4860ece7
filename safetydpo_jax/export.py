"""Hands a LoRA to PyTorch: `python -m safetydpo_jax.export --lora L --model M …`.

  diffusers  pytorch_lora_weights.safetensors, which `load_lora_weights` reads
  kohya      safetydpo_lora.safetensors, which A1111, Forge and ComfyUI read
  pipeline   a diffusers directory with the LoRA in the UNet's weights

and with each a model card, README.md, and export.json, which says what it was made of.
What the files hold: `formats/loras/write.py`, `kohya.py`, `fused.py`, `model_card.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.base_model import fused, hub, model_card, verify
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.loras import kohya
from safetydpo_jax.formats.loras.load import check_fits, load_lora, split_scale
from safetydpo_jax.formats.loras.write import (
  DTYPES,
  target_modules,
  write_diffusers,
  write_kohya,
)
from safetydpo_jax.formats.tensors import open_safetensors
from safetydpo_jax.lora import check_shapes, num_parameters, rank_of, scale
from safetydpo_jax.runtime import manifest

EXAMPLE = """example:
  python -m safetydpo_jax.export --lora runs/hate --model sd15 --format diffusers \\
    --out exported/hate
"""
FORMATS = ("diffusers", "kohya", "pipeline")
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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.export",
    description="Exports a LoRA for PyTorch.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--lora", required=True, metavar="L[:SCALE]", help="run directory or LoRA file")
  add("--model", required=True, metavar="M", help="the base model")
  add(
    "--format",
    default="diffusers",
    choices=FORMATS,
    help="a LoRA for diffusers, a LoRA for A1111 and ComfyUI, or the whole model with "
    "the LoRA in its weights (default: diffusers)",
  )
  add("--out", required=True, type=Path, help="folder to write to")
  add(
    "--dtype",
    choices=tuple(DTYPES),
    help="of the numbers (default: float32 for a LoRA, the base's for a pipeline)",
  )
  add("--variant", help='of the model\'s files, for example "fp16"')
  add("--figures", type=Path, metavar="JSON", help="evaluate's, for the model card")
  add(
    "--verify",
    action="store_true",
    help="load the result in PyTorch and compare predictions",
  )
  add(
    "--push",
    metavar="REPOSITORY",
    help="upload the result to the hub; a new repository is private",
  )
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  """Reads the LoRA, checks it against the model, writes it."""
  options = parse_arguments(arguments)
  if options.verify:
    verify.check_installed()
  name, factor = split_scale(options.lora)
  figures = model_card.read_figures(options.figures) if options.figures else ""
  lora, about = load_lora(name)
  if options.format == "pipeline":
    hub.locate(options.model, _FETCHED, options.variant, None)
  base = load_pipeline(options.model, components=(), variant=options.variant)
  check_fits(name, about, base.fingerprint)
  check_shapes(base.unet_shapes(), lora)
  lora = scale(lora, factor)

  dtype = options.dtype or "float32"
  whole = options.format == "pipeline"
  if whole:
    with fused.new_folder(options.out) as folder:
      files = write_pipeline(folder, base, lora, options)
      dtype = options.dtype or float_type(files[0])
      describe(folder, None, dtype, base, lora, about, figures, options)
  else:
    files = [write_lora(options.out, dtype, base, lora, about, options)]
    describe(options.out, files[0].name, dtype, base, lora, about, figures, options)
  print(
    f"{options.out}: {', '.join(file.name for file in files)}; rank {rank_of(lora)}, "
    f"{num_parameters(lora):,} parameters, {dtype}"
  )
  if options.verify:
    result = options.out if whole else files[0]
    found = verify.compare(base, lora, result, fused=whole, variant=options.variant)
    print(found.describe())
    verify.check(found, dtype)
  if options.push:
    push(options.out, options.push, None if whole else [files[0].name, CARD])


def write_lora(
  out: Path,
  dtype: str,
  base: Pipeline,
  lora: dict[str, Any],
  about: dict[str, Any],
  options: argparse.Namespace,
) -> Path:
  """The LoRA file in `out`."""
  shapes = base.unet_shapes()
  to = {"shapes": shapes, "dtype": DTYPES[dtype]}
  if options.format == "diffusers":
    targets = target_modules(lora, shapes)
    return write_diffusers(out, lora, targets, **to)
  header = kohya.header(
    base.unet.config,
    base.schedule.prediction_type,
    base.resolution,
    rank_of(lora),
    f"SafetyDPO {about.get('category') or 'LoRA'}",
  )
  return write_kohya(out, lora, header, **to)


def write_pipeline(
  out: Path, base: Pipeline, lora: dict[str, Any], options: argparse.Namespace
) -> list[Path]:
  """The fused pipeline in `out`; returns the UNet's files."""
  fused.copy_base(base.path, out)
  dtype = options.dtype and DTYPES[options.dtype]
  return fused.write_unet(out, base.path, lora, variant=options.variant, dtype=dtype)


def float_type(file: Path) -> str:
  """The type of a weight file's numbers, as it was the base's."""
  tensors, _ = open_safetensors(file)
  names = {tensor.dtype.name for tensor in tensors.values()}
  return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def describe(
  folder: Path,
  file: str | None,
  dtype: str,
  base: Pipeline,
  lora: dict[str, Any],
  about: dict[str, Any],
  figures: str,
  options: argparse.Namespace,
) -> None:
  """export.json and the model card."""
  card = model_card.Export(
    kind=options.format,
    file=file,
    base=options.model,
    fingerprint=base.fingerprint,
    variant=options.variant,
    about=about,
    rank=rank_of(lora),
    parameters=num_parameters(lora),
    dtype=dtype,
    repository=options.push,
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

  export.json stays here: it names folders of this machine. A repository that is not
  there is made private, since nobody can take a publication back.

  Args:
    folder: the export's.
    repository: hub id.
    names: the export's files; None: all, in a folder that was new. A LoRA may have been
      written into a run's directory, or beside other files that are nobody's business.

  Raises:
    InputError: the hub does not take it.
  """
  # Imported here: it takes a second, and most exports stay here.
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
      "login` and check the name; the export is complete"
    ) from error
  print(f"pushed to https://huggingface.co/{repository}")


if __name__ == "__main__":
  run_command(main)
