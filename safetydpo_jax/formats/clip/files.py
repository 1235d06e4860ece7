"""A whole CLIP from its files: both towers, projections, scale, tokenizer.

  config.json, model.safetensors[.index.json]            transformers
  open_clip_model.safetensors, open_clip_pytorch_model.bin,
    open_clip_config.json                                OpenCLIP (`open_clip.py`)
  preprocessor_config.json                               mean and standard deviation
  tokenizer.json or vocab.json and merges.txt            the tokenizer

A name that is not a path is looked up in the Hugging Face cache; nothing is downloaded.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import clip_tokenizer, open_clip_names, pickles
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.clip import open_clip
from safetydpo_jax.models import clip, clip_vision
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.clip_vision import CLIPVision
from safetydpo_jax.models.config import freeze
from safetydpo_jax.runtime.manifest import read_json

if TYPE_CHECKING:
  from transformers import CLIPTokenizer

MEAN = (
  0.48145466,
  0.4578275,
  0.40821073,
)  # of RGB in [0, 1]; OpenAI's, used by every CLIP
STD = (0.26862954, 0.26130258, 0.27577711)

_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_PATTERNS = ("*.json", "*.txt", "model*.safetensors", *_OPEN_CLIP)
# tower → prefixes of its tensors
_PREFIXES = {
  "vision": ("vision_model.", "visual_projection."),
  "text": ("text_model.", "text_projection."),
}
# Outside the towers: the scale, and constants in OpenAI's older files.
_APART = (
  *("logit_scale", "attn_mask", "input_resolution", "context_length"),
  "vocab_size",
)


@dataclasses.dataclass(frozen=True)
class Clip:
  """A CLIP model.

  Attributes:
    towers: {'vision': CLIPVision, 'text': CLIPText}; they hold no weights.
    params: {tower: parameter tree of numpy arrays}, for the towers asked for.
    logit_scale: the factor of the cosines, 100 in the published models.
    image_size: pixels per side that the vision tower takes.
    mean, std: of the RGB channels, (3,) float32, in [0, 1].
    tokenizer: a CLIP tokenizer; None unless the text tower was asked for.
    files: the weight files that were read.
  """

  towers: dict[str, CLIPVision | CLIPText]
  params: dict[str, Any]
  logit_scale: float
  image_size: int
  mean: np.ndarray
  std: np.ndarray
  tokenizer: "CLIPTokenizer | None"
  files: tuple[Path, ...]


def load_clip(
  name: str | Path,
  *,
  towers: Iterable[str] = ("vision", "text"),
  dtype: DTypeLike = jnp.float32,
  tokenizer: str | Path | None = None,
) -> Clip:
  """Reads a CLIP.

  Args:
    name: a directory, an OpenCLIP weight file, or a hub id that is in the cache.
    towers: which weights to read, of 'vision' and 'text'.
    dtype: the type of the weights and of the computation.
    tokenizer: the tokenizer's directory, by default the model's own.

  Raises:
    InputError: something is missing, incomplete, or of another kind.
  """
  path, towers = locate(str(name)), tuple(towers)
  folder = path if path.is_dir() else path.parent
  config, files = _config_and_files(path)
  modules = _modules(config, folder, dtype)
  tensors = _tensors(files)
  known = (*_PREFIXES["vision"], *_PREFIXES["text"], *_APART)
  if strange := [name for name in tensors if not name.startswith(known)]:
    raise InputError(
      f"{files[0]} has {len(strange)} tensors that do not belong in a CLIP, among them "
      f"{strange[0]}; use a plain vision transformer such as ViT-H-14"
    )
  tokens = None
  if "text" in towers:
    tokens = load_tokenizer(folder if tokenizer is None else Path(tokenizer))
  mean, std = _normalisation(folder)
  return Clip(
    towers=modules,
    params={
      tower: weights.convert(
        _part(tensors, _PREFIXES[tower]),
        tower_shapes(modules[tower]),
        dtype=dtype,
        source=f"the {tower} tower of {files[0]}",
      )
      for tower in towers
    },
    logit_scale=float(np.exp(np.float32(tensors.get("logit_scale", np.log(100))))),
    image_size=clip_vision.read_config(modules["vision"].config).image_size,
    mean=mean,
    std=std,
    tokenizer=tokens,
    files=tuple(files),
  )


def locate(name: str) -> Path:
  """The path of that name, or the hub cache's copy of that repository."""
  if Path(name).exists():
    return Path(name)
  # Imported here: it takes a second, and local paths do not need it.
  from huggingface_hub import snapshot_download

  try:
    return Path(
      snapshot_download(name, allow_patterns=list(_PATTERNS), local_files_only=True)
    )
  except (OSError, ValueError, RuntimeError) as error:
    raise InputError(
      f"CLIP {name!r} is neither a path nor in the Hugging Face cache; fetch it with "
      f"`hf download openai/clip-vit-large-patch14` (Q16) or `hf download "
      f"laion/CLIP-ViT-H-14-laion2B-s32B-b79K` (CLIPScore), or give a directory"
    ) from error


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
  """A CLIP tokenizer that reads texts as OpenCLIP's does.

  What follows the end token is immaterial to an embedding: the tower is causal, and
  pools at the end token.
  """
  if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
    raise InputError(
      f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); name "
      "the directory of any published CLIP's"
    )
  return clip_tokenizer.pad_with_end(clip_tokenizer.read(folder))


def tokenize(model: Clip, texts: list[str]) -> np.ndarray:
  """Token ids (n, length) int32, padded, and truncated before their end token."""
  length = clip.read_config(model.towers["text"].config).max_position_embeddings
  assert model.tokenizer is not None, "the text tower was not asked for"
  encoded = model.tokenizer(
    texts, padding="max_length", truncation=True, max_length=length
  )
  return np.asarray(encoded["input_ids"], np.int32).reshape(len(texts), length)


def _config_and_files(path: Path) -> tuple[dict, list[Path]]:
  """The config in transformers' words, and the weight files."""
  folder = path if path.is_dir() else path.parent
  config = folder / "config.json"
  if path.is_dir() and config.is_file() and any(path.glob("model*.safetensors*")):
    content = read_json(config, "CLIP")
    parts = ("vision_config", "text_config")
    if not isinstance(content, dict) or not all(
      isinstance(content.get(part), dict) for part in parts
    ):
      raise InputError(
        f"{config} is not the config of a whole CLIP: it lacks vision_config or "
        "text_config"
      )
    return content, weights.weight_files(path)
  files = [path] if path.is_file() else [path / name for name in _OPEN_CLIP]
  file = next((file for file in files if file.is_file()), None)
  if file is None:
    raise InputError(
      f"{path} is not a CLIP: expected config.json and model.safetensors, or one of "
      f"{' and '.join(_OPEN_CLIP)}"
    )
  config = folder / "open_clip_config.json"
  model: Any = open_clip.VIT_H_14
  if config.is_file():
    content = read_json(config, "OpenCLIP config")
    model = content.get("model_cfg") if isinstance(content, dict) else None
  return open_clip.config_of(model), [file]


def _tensors(files: list[Path]) -> dict[str, np.ndarray]:
  """All tensors, under transformers' names."""
  if files[0].suffix in (".bin", ".pt", ".pth"):
    return dict(open_clip_names.rename(pickles.read_tensors(files[0]).items()))
  tensors = dict(weights.read_tensors(files))
  if "visual.conv1.weight" in tensors:
    return dict(open_clip_names.rename(tensors.items()))
  return tensors


def _modules(
  config: dict, folder: Path, dtype: DTypeLike
) -> dict[str, CLIPText | CLIPVision]:
  """The towers; the projection's width is outside both of their configs."""
  width = {}
  if config.get("projection_dim") is not None:
    width = {"projection_dim": config["projection_dim"]}
  text = {
    **config["text_config"],
    **width,
    "architectures": ["CLIPTextModelWithProjection"],
    "model_type": "clip_text_model",
  }
  vision = {**config["vision_config"], **width}
  try:
    return {
      "vision": CLIPVision(freeze(vision), dtype),
      "text": CLIPText(freeze(text), dtype),
    }
  except TypeError as error:
    raise InputError(f"{folder} has an unusable CLIP config: {error}") from error


def tower_shapes(module: CLIPVision | CLIPText) -> dict:
  """A tower's parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
  inputs = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  if isinstance(module, CLIPVision):
    size = clip_vision.read_config(module.config).image_size
    inputs = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]


def _part(
  tensors: dict[str, np.ndarray], prefixes: tuple[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
  """One tower's tensors, without the first prefix."""
  for name, tensor in tensors.items():
    if name.startswith(prefixes):
      yield name.removeprefix(prefixes[0]), tensor


def _normalisation(folder: Path) -> tuple[np.ndarray, np.ndarray]:
  """(mean, standard deviation), (3,) float32 each, CLIP's own if no file gives them."""
  mean, std = MEAN, STD
  for name, keys in (
    ("preprocessor_config.json", ("image_mean", "image_std")),
    ("open_clip_config.json", ("mean", "std")),
  ):
    if (folder / name).is_file():
      content = read_json(folder / name, "CLIP")
      if isinstance(content, dict):
        content = content.get("preprocess_cfg", content)
        mean, std = (
          content.get(key) or default for key, default in zip(keys, (mean, std))
        )
      break
  try:
    return (
      np.asarray(mean, np.float32).reshape(3),
      np.asarray(std, np.float32).reshape(3),
    )
  except (TypeError, ValueError) as error:
    raise InputError(f"{folder / name}: {error}") from error
