"""SafetyDPO in JAX: LoRA safety experts for Stable Diffusion, trained with DPO.

The two loaders here are the package's stable Python interface; the commands are
`python -m safetydpo_jax.<name>`.
"""

from typing import Any


def load_pipeline(model: str, **options: Any):
  """A Stable Diffusion checkpoint; see `formats.pipeline.load_pipeline`."""
  from safetydpo_jax.formats.base_model import pipeline

  return pipeline.load_pipeline(model, **options)


def load_lora(lora: str) -> dict:
  """The LoRA tree of a run directory or a LoRA file, scale folded in; numpy float32.

  Raises:
    safetydpo_jax.errors.InputError: if it is neither, or damaged.
  """
  from safetydpo_jax.formats.loras import load as loras

  return loras.load_lora(lora)[0]


__all__ = ["load_lora", "load_pipeline"]
