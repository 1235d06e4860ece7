"""A single-file checkpoint as a diffusers directory, the LoRA in its UNet's weights.

What the file does not have (configs, scheduler, tokenizers) is written as it was read:
`single_file.py`. The UNet is written by `fused.py`, the other networks as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from safetydpo_jax.formats.base_model import fused
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.base_model.shared_tokenizer import SharedTokenizer
from safetydpo_jax.formats.base_model.single_file import SingleFile, component_of
from safetydpo_jax.formats.tensors import write_safetensors
from safetydpo_jax.runtime import files
from safetydpo_jax.runtime.manifest import write_json

_VERSION = "0.30.0"  # of diffusers, whose fields the configs have
_FILES = {"vae": "diffusion_pytorch_model.safetensors"}
_VOCABULARY = ("vocab.json", "merges.txt")


def write_directory(
  out: Path,
  base: Pipeline,
  single: SingleFile,
  lora: Mapping[str, Any],
  *,
  changes: Mapping[str, fused.Change] | None = None,
  dtype: DTypeLike | None = None,
) -> list[Path]:
  """Writes the whole model; returns the UNet's files.

  Args:
    out: the new directory.
    base: the model of the single file.
    single: the file.
    lora: LoRA tree, scale folded in, which fits the UNet.
    changes: of the UNet's weights besides, see `fused.write_unet`.
    dtype: of the UNet's new weights; None keeps each tensor's own.

  Raises:
    InputError: the file has no VAE, there is no tokenizer, or a number overflows
      `dtype`.
  """
  for name in base.modules():
    component_of(single, name)  # a missing one is reported before anything is written
  for tokenizer in base.tokenizers:
    if isinstance(tokenizer, SharedTokenizer):
      folder = tokenizer.folder()
      target = out / tokenizer.component
      loaded = tokenizer.load()
      with files.naming(target):
        loaded.save_pretrained(str(target))
      for file in (folder / name for name in _VOCABULARY):
        if file.is_file():
          files.copy(file, target / file.name)
  write_json(out / "model_index.json", single.model_index)
  for name in base.modules():
    write_config(out, single, name)
    if name != "unet":
      _write_weights(out / name / _FILES.get(name, "model.safetensors"), single, name)
  write_scheduler(out, single)
  unet = dict(component_of(single, "unet").read())
  return fused.write_tensors(
    out, unet, lora, str(single.path), changes=changes, dtype=dtype
  )


def write_config(out: Path, single: SingleFile, name: str) -> None:
  """Writes a component's config.json."""
  kind = single.model_index[name][1]
  about: dict[str, Any] = {"_class_name": kind, "_diffusers_version": _VERSION}
  if name.startswith("text_encoder"):
    about = {"architectures": [kind], "model_type": "clip_text_model"}
  write_json(out / name / "config.json", {**single.configs[name], **about})


def write_scheduler(out: Path, single: SingleFile) -> None:
  """Writes scheduler_config.json."""
  (out / "scheduler").mkdir(parents=True, exist_ok=True)
  content = {**single.scheduler, "_diffusers_version": _VERSION}
  write_json(out / "scheduler" / "scheduler_config.json", content)


def _write_weights(file: Path, single: SingleFile, name: str) -> None:
  # transformers before 5.6 has text encoders below `text_model`; later ones take it.
  below = "text_model." if name.startswith("text_encoder") else ""
  tensors = {
    key if key.startswith("text_projection.") else below + key: tensor
    for key, tensor in component_of(single, name).read()
  }
  if name == "vae":  # diffusers has linear layers where the file has 1×1 convolutions
    tensors = {
      key: x[:, :, 0, 0] if ".attentions." in key and x.ndim == 4 else x
      for key, x in tensors.items()
    }
  tensors = {
    key: x.astype(fused.new_dtype(x, None), copy=False) for key, x in tensors.items()
  }
  layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
  write_safetensors(file, layout, tensors.items(), {"format": "pt"})
