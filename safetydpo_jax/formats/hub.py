"""Where a model is: a directory, the toy model here, or a repository of the hub."""

from collections.abc import Iterable
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.weights import STEMS

PRESETS = {
  "toy": str(Path(__file__).parents[1] / "toyworld" / "model"),
  "sd15": "sd-legacy/stable-diffusion-v1-5",
  "sd21": "stabilityai/stable-diffusion-2-1",
  "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def locate(
  model: str, components: Iterable[str], variant: str | None, revision: str | None
) -> Path:
  """The local directory of a model, downloaded if it is a hub id."""
  path = Path(model)
  if path.is_dir():
    return path
  if path.exists():
    raise InputError(
      f"{model} is a file, expected a diffusers directory; convert it once with "
      "diffusers: StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
    )
  repository = PRESETS.get(model, model)
  if Path(repository).is_dir():
    return Path(repository)
  # Imported here: it takes a second, and local directories do without.
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError

  try:
    return Path(
      snapshot_download(
        repository,
        revision=revision,
        allow_patterns=download_patterns(components, variant),
      )
    )
  except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
    at = f" at revision {revision}" if revision else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"preset {model!r}" if model in PRESETS else f"model {model!r}"
    raise InputError(
      f"{what} is no directory here, and could not be had from the Hugging Face hub as "
      f"{repository}{at} ({reason}); give a diffusers directory, a hub id or one of "
      f"{', '.join(PRESETS)}"
    ) from error


def download_patterns(components: Iterable[str], variant: str | None) -> list[str]:
  """What to fetch: configs, tokenizers, and one variant's safetensors.

  The UNet always comes along, for its fingerprint.
  """
  dot = f".{variant}" if variant else ""
  patterns = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]
  for name in sorted({"unet", *components}):
    for stem in STEMS:
      patterns += [
        f"{name}/{stem}{dot}.safetensors",
        f"{name}/{stem}{dot}-?????-of-?????.safetensors",
        f"{name}/{stem}-?????-of-?????{dot}.safetensors",
        f"{name}/{stem}{dot}.safetensors.index.json",
        f"{name}/{stem}.safetensors.index{dot}.json",
      ]
  return list(dict.fromkeys(patterns))
