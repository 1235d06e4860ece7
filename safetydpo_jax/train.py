"""Trains one safety expert: `python -m safetydpo_jax.train --config … --workdir RUN`.

In: a config, a pair cache of `encode`, a Stable Diffusion checkpoint. Out, in RUN:
  lora/, expert.json    the expert (`loras/expert.py`), when the last step is done
  checkpoints/          LoRA, optimizer and data position (`checkpoint.py`)
  metrics.jsonl, tensorboard/
A run that was stopped goes on where its last checkpoint is when the same command is
given again, bit for bit as if it had not been stopped. SIGTERM on any host makes all
save and leave, with exit code 143.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import config_flags

from safetydpo_jax import lora
from safetydpo_jax.data.cache import batches, records
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.runtime import hosts, sharding
from safetydpo_jax.training import checkpoint, initial_lora, optimizer, tracking
from safetydpo_jax.training.config import check_config, print_plan, run_settings
from safetydpo_jax.training.step import init_state, jit_train_step

EXAMPLE = """example:
  python -m safetydpo_jax.train --config configs/hate.py:sd15 --workdir runs/hate \\
    --config.cache=cache/hate --config.steps=2000
"""

# What training computes with; the VAE's part is in the cache.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# What ml_collections raises for an unknown name, a value of the wrong type or a config
# file that is not there.
_CONFIG_ERRORS = (
  flags.Error,
  LookupError,
  AttributeError,
  TypeError,
  ValueError,
  OSError,
  ImportError,
)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Any, Path]:
  """The config with its overrides, and the run's directory."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.train",
    description="Trains one LoRA safety expert with Direct Preference Optimization.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:VARIANT]",
    help="a config of configs/; any value is overridden by --config.NAME=VALUE",
  )
  parser.add_argument("--workdir", required=True, type=Path, help="the run's directory")
  hosts.add_arguments(parser)
  known, overrides = parser.parse_known_args(arguments)
  for override in overrides:
    if not override.startswith("--config."):
      parser.error(
        f"unrecognized argument {override}; overrides are --config.NAME=VALUE"
      )
  file = Path(known.config.rpartition(":")[0] or known.config)
  if not (file.is_file() or Path(known.config).is_file()):
    raise InputError(
      f"--config {known.config}: there is no {file} here; run in the repository's "
      "root, or give the file's full path"
    )
  # A config imports its neighbours as `configs.…`, from wherever the command is run.
  sys.path.append(str(Path(known.config).resolve().parents[1]))
  line = ["train", f"--config={known.config}", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line)
  try:
    values(line)
    values.config.to_dict()  # a file that is not there shows only here
    return values.config, known.workdir
  except _CONFIG_ERRORS as error:
    # The library's message ends in ours, after a traceback; a KeyError's is quoted.
    reason = str(error.args[0] if error.args else error).strip().splitlines()[-1]
    if isinstance(error, (KeyError, AttributeError)):
      reason = "no value " + reason.strip("'\"").replace("\\n", ": ").replace(
        "\\'", "'"
      )
    raise InputError(f"--config {known.config}: {reason}") from error


def main(arguments: list[str] | None = None) -> None:
  """Reads, prepares, trains, writes: in the order things happen."""
  config, workdir = parse_arguments(arguments)
  hosts.initialize(preemption=True)
  sharding.use_precision(config.dtype)
  check_config(config)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  replicated = NamedSharding(mesh, sharding.REPLICATED)

  # The data and the model must have been made for each other.
  cache = records.open_cache(config.cache)
  pipeline = load_pipeline(
    config.model,
    components=COMPONENTS,
    dtype=config.dtype,
    attention=config.attention,
    remat=config.remat,
    variant=config.variant or None,
  )
  records.check_cache_fits(cache, pipeline)

  # State is born on the devices; base weights are placed once.
  tx = optimizer.make_optimizer(config)

  make_lora, origin = initial_lora.first_lora(config.lora, pipeline)
  make_state = jax.jit(lambda: init_state(make_lora(), tx), out_shardings=replicated)
  state = make_state()
  base_shardings = sharding.base_shardings(mesh, pipeline.params)
  params = sharding.place(pipeline.params, base_shardings)
  pipeline.params.clear()

  # A stopped run goes on from its newest checkpoint.
  settings = run_settings(config, pipeline, cache)
  checkpoints = checkpoint.open_checkpoints(workdir)
  if checkpoints.latest_step() is not None:
    if not config.resume:
      raise InputError(
        f"{workdir} holds a run already and config.resume is off; choose another "
        "--workdir"
      )
    state = checkpoint.restore(checkpoints, state, settings)
  start = int(state.step)
  if start > config.steps:
    raise InputError(
      f"{workdir} is at step {start} already, config.steps is {config.steps}; choose "
      "another --workdir"
    )
  if jax.process_index() == 0:
    print_plan(config, pipeline, cache, mesh, state)
    if start:
      print(f"resume from step {start}", flush=True)

  train_step = jit_train_step(config, pipeline, mesh, tx, base_shardings)
  feed = batches.train_batches(
    cache,
    category=config.category,
    mixture=config.mixture,
    held_out=config.holdout,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start,
    steps=config.steps,
    rows=sharding.host_rows(mesh, config.batch_size),
    caption_dropout=config.caption_dropout,
    flip=config.flip,
  )
  tracker = tracking.Tracker(
    workdir, start, config.steps, config.batch_size, config.log_every
  )

  def report(step, metrics):
    metrics = jax.device_get(metrics)
    for name in ("loss", "gradient_norm", "lora_norm"):
      if not math.isfinite(metrics[name]):
        last = checkpoints.latest_step()
        raise InputError(
          f"{name} is {metrics[name]} at step {step}; "
          + (f"the last checkpoint is step {last}" if last else "no checkpoint yet")
          + "; lower config.learning_rate, or check the cache"
        )
    tracker.log(step, metrics)

  # Metrics are read while the next step runs, so the host never waits for a step.
  # Leaving the block, for whatever reason, completes what is being saved.
  pending = None
  with checkpoint.watch_preemption() as asked, checkpoints, tracker:
    for step, batch in enumerate(feed, start=start + 1):
      state, metrics = train_step(state, params, sharding.place_batch(mesh, batch))
      if pending:
        report(*pending)
      pending = step, metrics
      stop = asked(step)
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        report(*pending)  # before saving: a checkpoint with NaN would be resumed from
        pending = None
        checkpoint.save(checkpoints, step, state, settings)
      if stop:
        break
  if (step := int(state.step)) < config.steps:
    if jax.process_index() == 0:
      print(f"stopped and saved at step {step}; the same command goes on from there")
    sys.exit(checkpoint.PREEMPTED)

  about = {
    "category": config.category,
    "rank": lora.rank_of(state.lora),
    "alpha": config.lora.alpha,
    "targets": list(config.lora.targets),
    "base": {"name": config.model, "fingerprint": pipeline.fingerprint},
    "step": int(state.step),
    "seed": config.seed,
    "dataset": cache.fingerprint,
    "config": config.to_dict(),
  }
  if origin:
    about["init"] = origin
  tree = lora.fold_alpha(state.lora, config.lora.alpha, config.lora.alpha_pattern)
  expert.write_expert(workdir, tree, about)
  if jax.process_index() == 0:
    print(f"expert written to {workdir}", flush=True)


if __name__ == "__main__":
  run_command(main)
