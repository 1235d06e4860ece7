"""SafetyDPO in JAX: LoRA safety experts for Stable Diffusion, trained with DPO.

The two loaders here are the package's stable Python interface; the commands are
`safetydpo NAME` or `python -m safetydpo_jax.NAME`. Importing the package does not
import JAX.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

from safetydpo_jax.runtime import accelerators

if TYPE_CHECKING:
  from safetydpo_jax.formats.base_model.pipeline import Pipeline
  from safetydpo_jax.lora import LoraTree

try:
  __version__ = metadata.version("safetydpo-jax")
except metadata.PackageNotFoundError:  # a checkout that is only on the path
  __version__ = "unknown"

accelerators.choose()


def load_pipeline(model: str, **options: Any) -> "Pipeline":
  """A Stable Diffusion checkpoint; see `formats.base_model.pipeline.load_pipeline`."""
  from safetydpo_jax.formats.base_model import pipeline

  return pipeline.load_pipeline(model, **options)


def load_lora(lora: str, unet_config: Any = None) -> "LoraTree":
  """The LoRA tree of a run directory or a LoRA file, scale folded in; numpy float32.

  `unet_config` is the base UNet's (`pipeline.unet.config`). A file that names layers by
  their number in another UNet than the published ones, as tiny-sd's, needs it.

  Raises:
    safetydpo_jax.errors.InputError: if it is neither, or damaged.
  """
  from safetydpo_jax.formats.loras import load as loras

  return loras.load_lora(lora, unet_config)[0]


__all__ = ["__version__", "load_lora", "load_pipeline"]
