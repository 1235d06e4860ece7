"""A training run's config: whether it can work, what may change, what it will do."""

import math
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from safetydpo_jax import dpo, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.training import optimizer

# Changing these does not make it another run. The model and the cache are compared by
# what is in them.
_FREE = (
  "model",
  "cache",
  "variant",
  "steps",
  "resume",
  "log_every",
  "checkpoint_every",
  "mesh",
  "accumulation",
  "remat",
  "attention",
)
# Options that came later: left out where they are off, so that older runs go on.
LATER = {
  "schedule": "constant",
  "lora.dropout": 0.0,
  "lora.rank_pattern": (),
  "lora.alpha_pattern": (),
  "lora.init": "",
}


def check_config(config: Any) -> None:
  """Raises `InputError` for values that cannot work together."""
  for name in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every"):
    if config[name] < 1:
      raise InputError(f"config.{name} is {config[name]}; expected 1 or more")
  choices = {
    "dpo.loss": (config.dpo.loss, tuple(dpo.LOSSES)),
    "dtype": (config.dtype, ("bfloat16", "float32")),
    "schedule": (config.schedule, tuple(optimizer.SCHEDULES)),
  }
  for name, (value, expected) in choices.items():
    if value not in expected:
      raise InputError(f"config.{name} is {value!r}; expected {' or '.join(expected)}")
  if not 0 <= config.lora.dropout < 1:
    raise InputError(
      f"config.lora.dropout is {config.lora.dropout}; expected 0 or more, below 1"
    )
  if not config.cache:
    raise InputError("config.cache is empty; give the folder that `encode` wrote")
  devices = jax.device_count()
  if config.batch_size % devices:
    raise InputError(
      f"config.batch_size is {config.batch_size} pairs; expected a multiple of the "
      f"{devices} devices"
    )
  rows = config.batch_size // devices
  if rows % config.accumulation:
    raise InputError(
      f"config.accumulation is {config.accumulation}, each device has {rows} of the "
      f"{config.batch_size} pairs; set config.accumulation="
      f"{math.gcd(rows, config.accumulation)}"
    )


def run_settings(config: Any, pipeline: Pipeline, cache: Any) -> dict[str, Any]:
  """What must be the same when a run goes on, by its dotted name."""

  def plain(value):  # as JSON gives it back
    return [plain(x) for x in value] if isinstance(value, (tuple, list)) else value

  # A rate that falls depends on where it ends.
  free = {*_FREE} - ({"steps"} if config.schedule != "constant" else set())
  values = {
    name: plain(value)
    for name, value in flatten_dict(config.to_dict(), sep=".").items()
    if name.split(".")[0] not in free and not (name in LATER and value == LATER[name])
  }
  return {**values, "dataset": cache.fingerprint, "base": pipeline.fingerprint}


def print_plan(
  config: Any, pipeline: Pipeline, cache: Any, mesh: Any, state: Any
) -> None:
  """What this run will do, with the numbers that decide whether it learns."""
  pairs, examples = cache.count(config.category, config.mixture, config.holdout)
  rate = optimizer.effective_learning_rate(config)
  device = jax.devices()[0].device_kind
  rows = {
    "model": f"{config.model} (fingerprint {pipeline.fingerprint}), "
    f"{pipeline.schedule.prediction_type}, {config.dtype}",
    "pairs": f"{config.category}: {pairs:,} pairs, {examples:,} examples "
    f"({config.mixture}), {config.steps * config.batch_size / examples:.1f} epochs",
    "LoRA": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, "
    + (f"from {config.lora.init}, " if config.lora.init else "")
    + (f"dropout {config.lora.dropout:g}, " if config.lora.dropout else "")
    + f"{len(jax.tree.leaves(state.lora)) // 2} layers, "
    f"{lora.num_parameters(state.lora):,} parameters, seed {config.lora.seed}",
    "loss": f"{config.dpo.loss}, β {config.dpo.beta:g} in σ(−½β·gap)",
    "batch": f"{config.batch_size} pairs = {config.accumulation} × "
    f"{config.batch_size // config.accumulation}, {jax.process_count()} process(es) × "
    f"{jax.local_device_count()} {device}, mesh {dict(mesh.shape)}",
    "rate": f"{config.optimizer} {rate:.3g}"
    + (f" = {config.learning_rate:g} × {config.batch_size}" if config.scale_lr else "")
    + f", {config.warmup_steps} warm-up steps, then {config.schedule}, "
    + f"{config.steps} steps",
  }
  print("\n".join(f"{name:6} {row}" for name, row in rows.items()), flush=True)
