"""A Stable Diffusion checkpoint in diffusers' layout, ready for JAX.

  model_index.json              the library and class that load each folder
  unet/ vae/ text_encoder[_2]/  config.json and weights
  tokenizer[_2]/                vocab.json, merges.txt and their settings
  scheduler/                    scheduler_config.json

The same code reads Stable Diffusion 1.x, 2.x and XL.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.typing import DTypeLike

from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import hub, weights
from safetydpo_jax.models import clip, vae
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition, example_inputs
from safetydpo_jax.models.vae import AutoencoderKL
from safetydpo_jax.runtime.manifest import read_json

if TYPE_CHECKING:
  from transformers import CLIPTokenizer

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# The classes of model_index.json that we can load.
CLASSES = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "text_encoder": ("CLIPTextModel",),
  "text_encoder_2": ("CLIPTextModelWithProjection",),
}


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A checkpoint's networks, tokenizers and noise schedule.

  Attributes:
    name: the model as the caller named it.
    path: the directory it was read from.
    unet, vae, text_encoders: the modules; they hold no weights.
    tokenizers: one for each text encoder.
    schedule: the noise schedule.
    params: {component: parameter tree of numpy arrays}, of the requested components.
    fingerprint: identifies the UNet's weights, see `weights.fingerprint`.
    latent_channels: channels of the latents.
    vae_scale: pixels per latent in each direction, 8 for the published models.
    scaling_factor: latents = scaling_factor · posterior sample.
    resolution: pixels per side that the UNet was trained for.
    vae_files: the VAE's weight files, if its weights were requested.
  """

  name: str
  path: Path
  unet: UNet2DCondition
  vae: AutoencoderKL
  text_encoders: tuple[CLIPText, ...]
  tokenizers: tuple["CLIPTokenizer", ...]
  schedule: Schedule
  params: dict[str, Any]
  fingerprint: str
  latent_channels: int
  vae_scale: int
  scaling_factor: float
  resolution: int
  vae_files: tuple[Path, ...] = ()

  def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Token ids (n, 77) int32 for each text encoder, padded and truncated.

    What is cut is said nowhere: see `count_tokens`.
    """
    return tuple(
      np.asarray(
        tokenizer(
          list(captions), padding="max_length", truncation=True, max_length=limit
        )["input_ids"],
        np.int32,
      )
      for tokenizer, limit in zip(self.tokenizers, self.token_limits)
    )

  def count_tokens(self, captions: Sequence[str]) -> np.ndarray:
    """(encoders, n): each caption's tokens, start and end included, none of them cut.

    `tokenize` cuts captions of more than `token_limits`.
    """
    return np.array(
      [
        # Not verbose: it would warn of more tokens than the encoder takes.
        [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]]
        for tokenizer in self.tokenizers
      ]
    )

  @property
  def token_limits(self) -> tuple[int, ...]:
    """How many tokens each text encoder takes, start and end included: 77."""
    configs = [clip.read_config(encoder.config) for encoder in self.text_encoders]
    return tuple(config.max_position_embeddings for config in configs)

  def modules(self) -> dict[str, UNet2DCondition | AutoencoderKL | CLIPText]:
    """The modules by component name."""
    encoders = zip(("text_encoder", "text_encoder_2"), self.text_encoders)
    return {"unet": self.unet, "vae": self.vae, **dict(encoders)}

  def unet_shapes(self) -> dict[str, Any]:
    """The UNet's parameter tree as `jax.ShapeDtypeStruct`, without weights."""
    return parameter_shapes(self.unet)


def load_pipeline(
  model: str | Path,
  *,
  components: Iterable[str] | None = None,
  dtype: DTypeLike = jnp.float32,
  variant: str | None = None,
  revision: str | None = None,
  attention: str = "auto",
  remat: str = "none",
  vae_from: str | Path | None = None,
) -> Pipeline:
  """Reads a checkpoint.

  Args:
    model: a diffusers directory, a name in `hub.PRESETS`, or a Hugging Face hub id. A
      path that exists wins.
    components: whose weights to read, of `COMPONENTS`; default all. All modules are
      built in any case.
    dtype: the type of the weights and of the computation.
    variant: of the weight files, for example "fp16".
    revision: branch, tag or commit on the hub.
    attention: the attention kernel, see `models.attention.attend`.
    remat: what the UNet's backward pass recomputes, see `models.blocks.REMAT`.
    vae_from: another VAE's folder or hub id, to which `variant` and `revision` do not
      apply; default the checkpoint's own, or a preset's in `hub.VAES`.

  Raises:
    InputError: the checkpoint does not exist, is incomplete, or is not supported.
  """
  wanted = COMPONENTS if components is None else tuple(components)
  if unknown := sorted(set(wanted) - set(COMPONENTS)):
    raise InputError(f"components {unknown} are unknown, expected some of {COMPONENTS}")
  vae_from = str(vae_from or hub.default_vae(str(model)) or "")
  fetched = [name for name in wanted if not (vae_from and name == "vae")]
  path = hub.locate(str(model), fetched, variant, revision)
  folders = {name: path / name for name in COMPONENTS}
  variants: dict[str, str | None] = dict.fromkeys(COMPONENTS, variant)
  if vae_from:
    folders["vae"] = hub.locate_vae(vae_from, "vae" in wanted)
    variants["vae"] = None

  files = _read_files(path, folders)
  encoders = _check_index(path, files.about)
  _check_sizes(path, files.configs, encoders)
  schedule = Schedule.from_config(files.scheduler)

  vae_config = files.configs["vae"]
  vae_scale = vae.pixels_per_latent(vae_config)
  unet = UNet2DCondition(files.configs["unet"], dtype, remat, attention)
  autoencoder = AutoencoderKL(vae_config, dtype)
  texts = {name: CLIPText(files.configs[name], dtype) for name in encoders}
  modules = {"unet": unet, "vae": autoencoder, **texts}
  shapes = {name: parameter_shapes(module) for name, module in modules.items()}
  return Pipeline(
    name=str(model),
    path=path,
    unet=unet,
    vae=autoencoder,
    text_encoders=tuple(texts.values()),
    tokenizers=tuple(
      _load_tokenizer(path / name.replace("text_encoder", "tokenizer"))
      for name in encoders
    ),
    schedule=schedule,
    params={
      name: weights.load_component(
        folders[name], shapes[name], dtype=dtype, variant=variants[name]
      )
      for name in modules
      if name in wanted
    },
    fingerprint=weights.fingerprint(
      weights.read_tensors(weights.weight_files(path / "unet", variant))
    ),
    latent_channels=vae.read_config(vae_config).latent_channels,
    vae_scale=vae_scale,
    scaling_factor=vae.read_config(vae_config).scaling_factor,
    resolution=_resolution(files.configs["unet"], vae_config, vae_scale),
    vae_files=tuple(
      weights.weight_files(folders["vae"], variants["vae"]) if "vae" in wanted else ()
    ),
  )


@functools.lru_cache(maxsize=16)
def parameter_shapes(module: UNet2DCondition | AutoencoderKL | CLIPText) -> dict:
  """A module's parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
  if isinstance(module, UNet2DCondition):
    inputs = example_inputs(module.config)
  elif isinstance(module, AutoencoderKL):
    side = vae.pixels_per_latent(module.config)
    channels = vae.read_config(module.config).in_channels
    inputs = (jnp.zeros((1, side, side, channels)),)
  else:
    inputs = (jnp.zeros((1, 2), jnp.int32),)
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


class _Files(NamedTuple):
  """A checkpoint's JSON files.

  Attributes:
    about: model_index.json.
    configs: {component: config.json, frozen}, of the components in the index.
    scheduler: scheduler_config.json.
  """

  about: dict[str, Any]
  configs: dict[str, FrozenDict[str, Any]]
  scheduler: dict[str, Any]


def _read_files(path: Path, folders: dict[str, Path]) -> _Files:
  """Reads the JSON files, without a look at what they say."""
  index = read_json(path / "model_index.json", "diffusers directory")
  configs = {}
  for name in COMPONENTS:
    if (kind := _class_of(index, name)) is not None:
      config = read_json(folders[name] / "config.json", f"{name} folder")
      # Configs of older text encoders do not name their class.
      defaults = {"architectures": (kind,)} if name.startswith("text_encoder") else {}
      configs[name] = freeze({**defaults, **config})
  scheduler = read_json(path / "scheduler" / "scheduler_config.json", "scheduler")
  return _Files(index, configs, scheduler)


def _class_of(index: dict[str, Any], component: str) -> str | None:
  """A component's class in model_index.json, None if it has none."""
  return (index.get(component) or [None, None])[1]


def _check_index(path: Path, index: dict[str, Any]) -> tuple[str, ...]:
  """Checks model_index.json; returns the names of the text encoders."""
  for name, classes in CLASSES.items():
    kind = _class_of(index, name)
    if kind is None and name == "text_encoder_2":
      continue
    if kind not in classes:
      raise InputError(
        f"{path / 'model_index.json'}: {name} is {kind!r}, expected "
        f"{' or '.join(classes)}; only Stable Diffusion 1, 2 and XL are supported"
      )
  return COMPONENTS[2 : 4 if _class_of(index, "text_encoder_2") else 3]


def _check_sizes(
  path: Path, configs: dict[str, FrozenDict[str, Any]], encoders: tuple[str, ...]
) -> None:
  """Refuses components that do not work together."""
  unet = configs["unet"]
  latent_channels = vae.read_config(configs["vae"]).latent_channels
  channels = unet.get("in_channels", 4)
  if channels != latent_channels or unet.get("out_channels", 4) != latent_channels:
    raise InputError(
      f"{path}: the UNet takes {channels} channels, the VAE has {latent_channels}; "
      "inpainting and image-conditioned checkpoints are not supported"
    )
  width = sum(clip.read_config(configs[n]).hidden_size for n in encoders)
  dims = unet.get("cross_attention_dim", 1280)
  if width not in (dims if isinstance(dims, tuple) else (dims,)):
    raise InputError(
      f"{path}: the UNet attends to {dims} text features, the text encoders give "
      f"{width}; the folders belong to different models"
    )


def _resolution(
  unet_config: FrozenDict[str, Any], vae_config: FrozenDict[str, Any], vae_scale: int
) -> int:
  """The training resolution in pixels; diffusers' default is 64 latents."""
  size = unet_config.get("sample_size")
  if size is None:
    size = vae_config.get("sample_size", 64 * vae_scale)
    vae_scale = 1
  return (max(size) if isinstance(size, tuple) else size) * vae_scale


def _load_tokenizer(folder: Path) -> "CLIPTokenizer":
  """A CLIP tokenizer; works without PyTorch."""
  from transformers import CLIPTokenizer  # Imported here: it takes two seconds.

  if not folder.is_dir():
    raise InputError(
      f"{folder} is missing: a text encoder needs its tokenizer; fetch the checkpoint "
      "again"
    )
  try:
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
  except (OSError, ValueError, TypeError, KeyError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(f"cannot read {folder} as a CLIP tokenizer: {reason}") from error
