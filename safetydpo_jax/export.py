"""Hands a LoRA to PyTorch: `python -m safetydpo_jax.export --lora L --model M …`.

`diffusers` writes pytorch_lora_weights.safetensors (`formats/lora_files.py`), which
`StableDiffusionPipeline.load_lora_weights` reads as it is, and export.json beside it.
"""

import argparse
from pathlib import Path

from flax.traverse_util import flatten_dict

from safetydpo_jax.errors import run_command
from safetydpo_jax.formats import lora_files, loras, manifest
from safetydpo_jax.formats.pipeline import load_pipeline
from safetydpo_jax.lora import check_shapes, num_parameters, rank_of, scale

EXAMPLE = """example:
  python -m safetydpo_jax.export --lora runs/hate --model sd15 --format diffusers \\
    --out exported/hate
"""


def main(arguments: list[str] | None = None) -> None:
  """Reads the LoRA, checks it against the model, writes it."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.export",
    description="Exports a LoRA for PyTorch.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--lora", required=True, metavar="L[:SCALE]", help="run directory or LoRA file"
  )
  parser.add_argument("--model", required=True, metavar="M", help="the base model")
  parser.add_argument("--format", default="diffusers", choices=["diffusers"])
  parser.add_argument("--out", required=True, type=Path, help="folder to write to")
  parser.add_argument("--variant", help='of the model\'s files, for example "fp16"')
  options = parser.parse_args(arguments)

  name, factor = loras.split_scale(options.lora)
  lora, about = loras.load_lora(name)
  pipeline = load_pipeline(options.model, components=(), variant=options.variant)
  loras.check_fits(name, about, pipeline.fingerprint)
  check_shapes(pipeline.unet_shapes(), lora)

  file = lora_files.write_diffusers(
    options.out, scale(lora, factor), lora_files.adapted_layers(lora)
  )
  manifest.write_json(
    options.out / "export.json",
    {
      "lora": options.lora,
      "about": about,
      "base": {"name": options.model, "fingerprint": pipeline.fingerprint},
      "versions": manifest.versions(),
    },
  )
  print(
    f"{file}: rank {rank_of(lora)}, {num_parameters(lora):,} parameters in "
    f"{len(flatten_dict(lora))} tensors"
  )


if __name__ == "__main__":
  run_command(main)
