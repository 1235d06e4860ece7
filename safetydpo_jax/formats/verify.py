"""Does an export predict in PyTorch what this package predicts?

diffusers loads the base and the LoRA (`load_lora_weights`), or the fused pipeline
(`from_pretrained`, or `from_single_file` with the base's configs), in float32, and
predicts on random latents, timesteps and contexts; our UNet predicts with the LoRA as
it was before the export, in full float32 on TPUs and GPUs too. Only one of the two
models is in memory at a time.
"""

import functools
import gc
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import unfreeze

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.fused import component_names
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.models.unet import UNet2DCondition, example_inputs
from safetydpo_jax.runtime.manifest import write_json

# The largest difference that rounding explains, relative to the predictions' standard
# deviation.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_NEEDED = ("torch", "diffusers", "peft", "transformers")


class Comparison(NamedTuple):
  """Largest differences between predictions, and the predictions' scale."""

  difference: float  # PyTorch's - ours
  effect: float  # ours with the LoRA - ours without it
  deviation: float  # standard deviation of ours

  def describe(self) -> str:
    """One line."""
    return (
      f"largest difference between PyTorch and this package {self.difference:.1e}, on "
      f"predictions of standard deviation {self.deviation:.2f} that the LoRA changes "
      f"by up to {self.effect:.1e}"
    )


def check_installed() -> None:
  """Raises `InputError` if PyTorch, or a package that loads a LoRA, is missing."""
  import importlib.util

  missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  if missing:
    raise InputError(
      f"--verify needs {', '.join(missing)}, which is not installed; run "
      "`pip install torch peft`, or leave out --verify"
    )


def compare(
  base: Pipeline,
  lora: Mapping[str, Any],
  exported: Path,
  *,
  fused: bool,
  fold: Callable[[Any], Any] = lambda params: params,
  variant: str | None = None,
) -> Comparison:
  """Loads the export in PyTorch and compares predictions.

  Args:
    base: the base model; its weights are not needed.
    lora: the tree that was exported.
    exported: the LoRA file, or the folder or file of the fused pipeline.
    fused: which of the two.
    fold: the UNet's weights → those with what was exported besides the tree.
    variant: of the base's files and the fused pipeline's.
  """
  inputs = draw_inputs(base)
  theirs = _predict_torch(base, exported, fused, variant, inputs)
  gc.collect()
  name = base.name if base.single else str(base.path)
  weights = load_pipeline(name, components=("unet",), variant=variant)
  silent = jax.tree.map(np.zeros_like, lora)  # so that one program does for both
  with jax.default_matmul_precision("highest"):
    before = _predict(weights.unet, weights.params["unet"], silent, *inputs)
    ours = _predict(weights.unet, fold(weights.params["unet"]), lora, *inputs)
  return Comparison(
    difference=float(np.abs(theirs - np.asarray(ours)).max()),
    effect=float(np.abs(ours - before).max()),
    deviation=float(ours.std()),
  )


@functools.partial(jax.jit, static_argnums=0)
def _predict(
  unet: UNet2DCondition, params: Any, lora: Mapping[str, Any], *inputs: Any
) -> Any:
  return unet.apply({"params": params, "lora": lora}, *inputs)


def check(comparison: Comparison, dtype: str) -> None:
  """Raises `InputError` if rounding to `dtype` does not explain the difference."""
  allowed = TOLERANCE[dtype] * comparison.deviation
  if not comparison.difference <= allowed:
    raise InputError(
      f"--verify: {comparison.describe()}; rounding to {dtype} explains {allowed:.1e}; "
      "do not publish this export, and report the problem"
    )


def draw_inputs(base: Pipeline) -> tuple:
  """Random latents (2, 16, 16, c), timesteps (2,), context (2, 7, d), added_cond."""
  rng = np.random.default_rng(0)
  latents, _, context, added = example_inputs(base.unet.config)

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  if added is not None:
    size = float(base.resolution)
    added = {
      "text_embeds": draw(2, added["text_embeds"].shape[1]),
      "time_ids": np.array([[size, size, 0, 0, size, size]] * 2, np.float32),
    }
  return (
    draw(2, 16, 16, latents.shape[-1]),
    np.array([50, 800]),
    draw(2, 7, context.shape[-1]),
    added,
  )


def _predict_torch(
  base: Pipeline, exported: Path, fused: bool, variant: str | None, inputs: tuple
) -> np.ndarray:
  """The prediction of diffusers' UNet, (n, h, w, c)."""
  import torch
  from diffusers import DiffusionPipeline
  from diffusers.utils import logging

  logging.set_verbosity_error()  # it warns that there is no LoRA of text encoders
  logging.disable_progress_bar()
  if fused and exported.is_file():
    pipeline = _from_single_file(exported, base)
  elif fused:
    pipeline = DiffusionPipeline.from_pretrained(exported, variant=variant)
  elif base.single:
    pipeline = _from_single_file(base.path, base)
  else:
    others = dict.fromkeys(set(component_names(base.path)) - {"unet", "scheduler"})
    pipeline = DiffusionPipeline.from_pretrained(base.path, variant=variant, **others)
  if not fused:
    pipeline.load_lora_weights(exported.parent, weight_name=exported.name)
  latents, timesteps, context, added = inputs
  condition = added and {name: torch.from_numpy(x) for name, x in added.items()}
  with torch.no_grad():
    sample = pipeline.unet.float()(
      torch.from_numpy(latents).permute(0, 3, 1, 2),
      torch.from_numpy(timesteps),
      torch.from_numpy(context),
      added_cond_kwargs=condition,
    ).sample
  return sample.permute(0, 2, 3, 1).numpy()


def _from_single_file(file: Path, base: Pipeline) -> Any:
  """diffusers' pipeline of a single file: its UNet, by the base's configs."""
  import diffusers

  kept = ("unet", "scheduler")
  others = [
    name
    for name, entry in base.index.items()
    if isinstance(entry, (list, tuple)) and name not in kept
  ]
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for component in kept:
      (folder / component).mkdir()
    write_json(folder / "model_index.json", dict(base.index))
    write_json(folder / "unet" / "config.json", unfreeze(base.unet.config))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    write_json(scheduler, unfreeze(base.schedule.config))
    kind = getattr(diffusers, base.index["_class_name"])
    return kind.from_single_file(str(file), config=name, **dict.fromkeys(others))
