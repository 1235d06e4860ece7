"""A Stable Diffusion checkpoint in diffusers' layout, ready for JAX.

  model_index.json              the library and class that load each folder
  unet/ vae/ text_encoder[_2]/  config.json and weights
  tokenizer[_2]/                vocab.json, merges.txt and their settings
  scheduler/                    scheduler_config.json

The same code reads Stable Diffusion 1.x, 2.x and XL. A checkpoint in a single file is
translated to these terms by `single_file.py`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import clip_tokenizer
from safetydpo_jax.formats.base_model import (
  component_files,
  hub,
  old_files,
  single_file,
  weights,
)
from safetydpo_jax.formats.base_model.configs import Configs, image_size, read_configs
from safetydpo_jax.formats.base_model.module_shapes import parameter_shapes
from safetydpo_jax.formats.base_model.parts import (
  COMPONENTS,
  check_index,
  check_sizes,
)
from safetydpo_jax.formats.base_model.shared_tokenizer import shared_tokenizers
from safetydpo_jax.formats.base_model.single_file import SingleFile
from safetydpo_jax.models import clip, vae
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.models.vae import AutoencoderKL
from safetydpo_jax.runtime.log import note
from safetydpo_jax.runtime.manifest import read_json

if TYPE_CHECKING:
  from transformers import CLIPTokenizer


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A checkpoint's networks, tokenizers and noise schedule.

  Attributes:
    name: the model as the caller named it.
    path: the directory or the single file it was read from.
    unet, vae, text_encoders: the modules; they hold no weights.
    tokenizers: one for each text encoder.
    schedule: the noise schedule.
    params: {component: parameter tree of numpy arrays}, of the requested components.
    fingerprint: identifies the UNet's weights, see `weights.fingerprint`.
    latent_channels: channels of the latents.
    vae_scale: pixels per latent in each direction, 8 for the published models.
    scaling_factor: latents = scaling_factor · posterior sample.
    image_size: (height, width) in pixels that the UNet was trained for.
    index: model_index.json.
    vae_files: the VAE's weight files, if its weights were requested.
    vae_fingerprint: identifies the VAE's weights, if they were requested.
    variant: of the UNet's weight files.
    single: the single file, if it was read from one.
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
  image_size: tuple[int, int]
  index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  vae_files: tuple[Path, ...] = ()
  vae_fingerprint: str = ""
  variant: str | None = None
  single: SingleFile | None = None

  @property
  def resolution(self) -> int:
    """The longer side of `image_size`."""
    return max(self.image_size)

  def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Token ids (n, 77) int32 for each text encoder, padded and truncated.

    To the tokenizer's length, as in diffusers, or the encoder's if that is shorter: see
    `token_limits`. It does not say what is cut: see `count_tokens`.
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
    """How many tokens each text encoder is given, start and end included: 77.

    Old tokenizers have no length of their own, which is read as 10³⁰.
    """
    return tuple(
      min(tokenizer.model_max_length, positions)
      for tokenizer, positions in zip(self.tokenizers, self.positions)
    )

  @property
  def positions(self) -> tuple[int, ...]:
    """How many tokens each text encoder can take: 77."""
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
    model: a diffusers directory, a single-file checkpoint (a .safetensors file, with
      :epsilon or :v_prediction behind it to choose what its UNet predicts), a name in
      `hub.PRESETS`, or a Hugging Face hub id. A path that exists wins.
    components: whose weights to read, of `COMPONENTS`; default all. All modules are
      built in any case.
    dtype: the type of the weights and of the computation.
    variant: of the weight files, for example "fp16"; components that do not have it are
      read without.
    revision: branch, tag or commit on the hub.
    attention: the attention kernel, see `models.attention.attend`.
    remat: what the UNet's backward pass recomputes, see `models.blocks.REMAT`.
    vae_from: another VAE's folder, .safetensors file or hub id, to which `variant` and
      `revision` do not apply; default the checkpoint's own, or that of `hub.VAES`.

  Raises:
    InputError: the checkpoint does not exist, is incomplete, or is not supported.
  """
  wanted = COMPONENTS if components is None else tuple(components)
  if unknown := sorted(set(wanted) - set(COMPONENTS)):
    raise InputError(f"components {unknown} are unknown, expected some of {COMPONENTS}")
  vae_from = str(vae_from or hub.default_vae(str(model)) or "")
  fetched = [name for name in wanted if not (vae_from and name == "vae")]
  path = hub.locate(str(model), fetched, variant, revision)
  single = single_file.read(path, str(model), variant) if path.is_file() else None
  inside = dict(single.components) if single else {}
  folders = {name: path / name for name in COMPONENTS}
  other_vae = hub.locate_vae(vae_from, "vae" in wanted) if vae_from else None
  if other_vae:
    inside.pop("vae", None)
    if other_vae.is_dir():
      folders["vae"] = other_vae

  index = (
    single.model_index
    if single
    else read_json(path / "model_index.json", "diffusers directory")
  )
  encoders = check_index(path, index)
  configs, scheduler = (
    _single_configs(single, folders["vae"])
    if single
    else read_configs(folders, path / "scheduler", encoders)
  )
  if other_vae and other_vae.is_file():
    scaling_factor = vae.read_config(configs["vae"]).scaling_factor
    inside["vae"] = single_file.open_vae(other_vae, scaling_factor)
    configs["vae"] = freeze(inside["vae"].config)
  if single and not other_vae and "vae" in set(wanted) - inside.keys():
    raise InputError(
      f"{path} has no VAE in it (first_stage_model.); name one with --vae"
    )
  check_sizes(path, configs)
  schedule = Schedule.from_config(scheduler)

  parts = [name for name in ("vae", *encoders) if name in wanted and name in fetched]
  variants = (
    {} if single else _choose_variants(folders, ("unet", *parts), variant, path)
  )
  vae_config = configs["vae"]
  vae_scale = vae.pixels_per_latent(vae_config)
  unet = UNet2DCondition(configs["unet"], dtype, remat, attention)
  autoencoder = AutoencoderKL(vae_config, dtype)
  texts = {name: CLIPText(configs[name], dtype) for name in encoders}
  modules = {"unet": unet, "vae": autoencoder, **texts}
  shapes = {name: parameter_shapes(module) for name, module in modules.items()}

  def files_of(name: str) -> tuple[Path, ...]:
    if name in inside:
      return (inside[name].path,)
    return tuple(component_files.weight_files(folders[name], variants.get(name)))

  def read(name: str) -> Iterable[tuple[str, np.ndarray]]:
    return (
      inside[name].read() if name in inside else weights.read_tensors(files_of(name))
    )

  def load(name: str) -> dict[str, Any]:
    if name in inside:
      source = f"{inside[name].path} ({name})"
      return weights.convert(read(name), shapes[name], dtype=dtype, source=source)
    return weights.load_component(
      folders[name], shapes[name], dtype=dtype, variant=variants.get(name)
    )

  weights.note_float8(read("unet"), f"{path}: the UNet", dtype)

  return Pipeline(
    name=str(model),
    path=path,
    unet=unet,
    vae=autoencoder,
    text_encoders=tuple(texts.values()),
    tokenizers=shared_tokenizers(path, single.family.encoders)
    if single
    else tuple(
      _load_tokenizer(path / name.replace("text_encoder", "tokenizer"))
      for name in encoders
    ),
    schedule=schedule,
    params={name: load(name) for name in modules if name in wanted},
    fingerprint=weights.fingerprint(read("unet")),
    latent_channels=vae.read_config(vae_config).latent_channels,
    vae_scale=vae_scale,
    scaling_factor=vae.read_config(vae_config).scaling_factor,
    image_size=image_size(configs["unet"], vae_config),
    index=index,
    vae_files=files_of("vae") if "vae" in wanted else (),
    vae_fingerprint=weights.fingerprint(read("vae")) if "vae" in wanted else "",
    variant=variants.get("unet"),
    single=single,
  )


def _single_configs(single: SingleFile, vae_folder: Path) -> Configs:
  """A single file's settings, with those of another model's VAE if it has a folder."""
  configs = {name: freeze(config) for name, config in single.configs.items()}
  if vae_folder.is_dir():
    file = vae_folder / "config.json"
    config = old_files.correct_vae(read_json(file, "vae folder"), str(file))
    configs["vae"] = freeze(config)
  return Configs(configs, single.scheduler)


def _choose_variants(
  folders: dict[str, Path], names: Iterable[str], variant: str | None, path: Path
) -> dict[str, str | None]:
  """The variant of each component's files; a line says which do not have it."""
  chosen = {
    name: variant
    if component_files.is_there([f.name for f in folders[name].glob("*")], variant)
    else None
    for name in names
  }
  if variant and (without := [name for name, its in chosen.items() if its is None]):
    note(
      f"{path}: no files of variant {variant!r} in {', '.join(without)}; read without"
    )
  return chosen


def _load_tokenizer(folder: Path) -> "CLIPTokenizer":
  if not folder.is_dir():
    raise InputError(
      f"{folder} is missing: a text encoder needs its tokenizer; fetch the checkpoint "
      "again"
    )
  return clip_tokenizer.read(folder)
