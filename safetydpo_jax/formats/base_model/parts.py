"""model_index.json: what a pipeline draws from, and whether its parts make one.

    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],      library and class of a folder
    "safety_checker": [null, null],                     a part that is not there
    "force_zeros_for_empty_prompt": true                a setting

Pipelines of other kinds may have Stable Diffusion's parts and mean something else by
them: a UNet that expects a picture's features in place of a text's gives noise. Which
classes share their parts with text to image is what `AutoPipelineForText2Image` of
diffusers says: those that inpaint or start from a picture, with or without PAG.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.core import FrozenDict

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.single_file_kinds import describe_unet
from safetydpo_jax.models import clip, vae
from safetydpo_jax.runtime.log import note

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# The classes of model_index.json that we can load.
CLASSES = {
  "unet": ("UNet2DConditionModel",),
  "vae": ("AutoencoderKL",),
  "text_encoder": ("CLIPTextModel",),
  "text_encoder_2": ("CLIPTextModelWithProjection",),
}
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# Parts that a text-to-image pipeline has besides, which we need not read.
_UNREAD = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")

_TEXT_TO_IMAGE = re.compile(
  r"StableDiffusion(XL)?(PAG)?(Img2Img|Inpaint)?Pipeline(Legacy)?|"
  r"LatentConsistencyModel(Img2Img)?Pipeline"
)
# The UNet is text to image's own; what steers it is another network beside it.
_STEERED = re.compile(
  r"StableDiffusion(XL)?(ControlNet(Union)?(PAG)?(Img2Img|Inpaint)?|Adapter)Pipeline"
)
# What part of a class's name says of a UNet that is not text to image's.
_OTHER_KINDS = {
  "InstructPix2Pix": "edits a picture as instructed",
  "Depth2Img": "draws from a picture's depth",
  "Upscale": "enlarges pictures",
  "ImageVariation": "draws from a picture",
  "UnCLIP": "draws from a picture's embedding",
  "Zero123": "turns the object of a picture",
  "PaintByExample": "draws from a picture",
  "GLIGEN": "draws objects in boxes",
  "LDM3D": "draws with depth",
  "Marigold": "estimates depth",
  "Animate": "draws videos",
  "Video": "draws videos",
}


def class_of(index: Mapping[str, Any], component: str) -> str | None:
  """A component's class in model_index.json, None if it has none."""
  return _parts(index).get(component)


def _parts(index: Mapping[str, Any]) -> dict[str, str]:
  """{part: class} of the parts that are there."""
  return {
    name: entry[1]
    for name, entry in index.items()
    if not name.startswith("_")
    and isinstance(entry, list)
    and len(entry) == 2
    and isinstance(entry[1], str)
  }


def check_index(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
  """Checks model_index.json; returns {text encoder: its class}, one or two.

  Raises:
    InputError: it is another kind of pipeline, or has parts of other kinds.
  """
  file = path / "model_index.json"
  if not isinstance(index, Mapping):
    raise InputError(f"{file} is {type(index).__name__}, expected an object of parts")
  _check_kind(file, index)
  for name, classes in CLASSES.items():
    kind = class_of(index, name)
    if kind is None and name == "text_encoder_2":
      continue
    if kind not in classes:
      raise InputError(
        f"{file}: {name} is {kind!r}, expected {' or '.join(classes)}; only Stable "
        "Diffusion 1, 2 and XL are supported"
      )
  kinds = {name: class_of(index, name) for name in COMPONENTS[2:]}
  encoders = {name: kind for name, kind in kinds.items() if kind is not None}
  for name in (encoder.replace("text_encoder", "tokenizer") for encoder in encoders):
    kind = class_of(index, name)
    if kind is not None and kind not in _TOKENIZERS:
      raise InputError(
        f"{file}: {name} is {kind!r}, expected {' or '.join(_TOKENIZERS)}; checkpoints "
        "with a vocabulary of their own are not supported"
      )
  return encoders


def _check_kind(file: Path, index: Mapping[str, Any]) -> None:
  """Refuses pipelines that do not draw from text alone, by their class and parts."""
  kind = index.get("_class_name")
  if isinstance(kind, list) and kind:  # custom code: [its file, the class]
    kind = kind[-1]
  kind = str(kind).removeprefix("Flax") if kind is not None else None
  as_which = f"StableDiffusion{'XL' if class_of(index, 'text_encoder_2') else ''}"
  as_which += "Pipeline"
  how = f"give a checkpoint of text to image, such as {as_which}'s"
  more = _parts(index).keys() - {*COMPONENTS, *_UNREAD, "tokenizer", "tokenizer_2"}
  extra = ", ".join(sorted(more))
  if kind and (_TEXT_TO_IMAGE.fullmatch(kind) or _STEERED.fullmatch(kind)):
    if extra:
      note(f"{file} lists {extra}, which is not used: it is read as for {as_which}")
    return
  for part, what in _OTHER_KINDS.items():
    if kind and part in kind:
      raise InputError(f"{file} is for {kind}, which {what}; {how}")
  if extra:
    raise InputError(
      f"{file} is for {kind or 'no known class'} and lists {extra}, which is not part "
      f"of text to image; {how}"
    )
  if kind:
    note(f"{file} is for {kind}, which is not known; it is read as for {as_which}")


def check_sizes(path: Path, configs: Mapping[str, FrozenDict[str, Any]]) -> None:
  """Refuses components that do not work together; `configs` by component."""
  unet, autoencoder = configs["unet"], vae.read_config(configs["vae"])
  latent_channels = autoencoder.latent_channels
  if (autoencoder.in_channels, autoencoder.out_channels) != (3, 3):
    raise InputError(
      f"{path}: the VAE takes {autoencoder.in_channels} channels and gives "
      f"{autoencoder.out_channels}; expected the 3 of RGB"
    )
  channels = unet.get("in_channels", 4)
  if channels != latent_channels or unet.get("out_channels", 4) != latent_channels:
    kind = describe_unet(channels)
    reason = (
      f"this is {kind}, which is not supported"
      if kind
      else "they belong to different models"
    )
    raise InputError(
      f"{path}: the UNet takes {channels} channels and gives "
      f"{unet.get('out_channels', 4)}, the VAE has {latent_channels}; {reason}"
    )
  width = sum(
    clip.read_config(configs[n]).hidden_size for n in configs if n in COMPONENTS[2:]
  )
  dims = unet.get("cross_attention_dim", 1280)
  if width not in (dims if isinstance(dims, tuple) else (dims,)):
    raise InputError(
      f"{path}: the UNet attends to {dims} text features, the text encoders give "
      f"{width}; the folders belong to different models"
    )
