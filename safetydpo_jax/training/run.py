"""One training run, from its config to its expert: in the order things happen.

In: a config, a pair cache of `encode`, a Stable Diffusion checkpoint. Out, in RUN:
  lora/, expert.json    the expert (`formats/loras/expert.py`), after the last step
  checkpoints/          LoRA, optimizer and settings (`checkpoint.py`)
  metrics.jsonl, tensorboard/
A run that was stopped continues from its last checkpoint when it is started again, bit
for bit as if it had not been stopped. SIGTERM on any host makes all of them save and
exit with code 143.
"""

import math
import sys
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding

from safetydpo_jax import lora
from safetydpo_jax.data.cache import batches, records
from safetydpo_jax.data.cache.records import PairCache
from safetydpo_jax.dpo import Metrics
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.runtime import sharding
from safetydpo_jax.training import checkpoint, initial_lora, optimizer, tracking
from safetydpo_jax.training.config import RunConfig, check_devices
from safetydpo_jax.training.step import TrainState, init_state, jit_train_step

# What training computes with; the VAE's part is in the cache.
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def train(config: RunConfig, workdir: Path) -> None:
  """Trains one expert, or resumes its run; `hosts.initialize` has been called.

  Args:
    config: the run's config.
    workdir: RUN, the folder of everything that the run writes.

  Raises:
    InputError: config, cache, model and an earlier run in `workdir` do not fit each
      other, or the loss diverges.
    SystemExit: the run was preempted; it is saved.
  """
  if not config.cache:
    raise InputError("config.cache is empty; give the folder that `encode` wrote")
  sharding.use_precision(config.dtype)
  check_devices(config, jax.device_count())
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
  first = initial_lora.first_lora(config.lora, pipeline)
  make_state = jax.jit(lambda: init_state(first.make(), tx), out_shardings=replicated)
  state = make_state()
  base_shardings = sharding.base_shardings(mesh, pipeline.params)
  params = sharding.place(pipeline.params, base_shardings)
  pipeline.params.clear()

  settings = checkpoint.run_settings(config, pipeline, cache)
  checkpoints = checkpoint.open_checkpoints(workdir)
  if checkpoints.latest_step() is not None:
    if not config.resume:
      raise InputError(
        f"{workdir} already holds a run and config.resume is off; choose another "
        "--workdir"
      )
    state = checkpoint.restore(checkpoints, state, settings)
  start = int(state.step)
  if start > config.steps:
    raise InputError(
      f"{workdir} is already at step {start}, config.steps is {config.steps}; choose "
      "another --workdir"
    )
  if jax.process_index() == 0:
    print(describe(config, pipeline, cache, mesh, state), flush=True)
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
    rows=sharding.host_rows(mesh, config.batch_size).tolist(),
    caption_dropout=config.caption_dropout,
    flip=config.flip,
  )
  tracker = tracking.Tracker(
    workdir, start, config.steps, config.batch_size, config.log_every
  )

  def report(step: int, metrics: Metrics) -> None:
    metrics = jax.device_get(metrics)
    _check_finite(metrics, step, checkpoints.latest_step())
    tracker.log(step, metrics)

  # Metrics are read while the next step runs, so the host never waits for a step.
  # Leaving the block, for whatever reason, completes what is being saved.
  pending: tuple[int, Metrics] | None = None
  with checkpoint.on_preemption() as preempted, checkpoints, tracker:
    for step, batch in enumerate(feed, start=start + 1):
      state, metrics = train_step(state, params, sharding.place_batch(mesh, batch))
      if pending:
        report(*pending)
      pending = step, metrics
      stop = preempted(step)
      if stop or step % config.checkpoint_every == 0 or step == config.steps:
        report(*pending)  # before saving: a checkpoint with NaN would be resumed from
        pending = None
        checkpoint.save(checkpoints, step, state, settings)
      if stop:
        break
  if (step := int(state.step)) < config.steps:
    if jax.process_index() == 0:
      print(f"stopped and saved at step {step}; the same command resumes from there")
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
  if first.origin:
    about["init"] = first.origin
  tree = lora.fold_alpha(state.lora, config.lora.alpha, config.lora.alpha_pattern)
  expert.write_expert(workdir, tree, about)
  if jax.process_index() == 0:
    print(f"expert written to {workdir}", flush=True)


def _check_finite(metrics: Metrics, step: int, last_saved: int | None) -> None:
  for name in ("loss", "gradient_norm", "lora_norm"):
    if not math.isfinite(metrics[name]):
      saved = f"the last checkpoint is step {last_saved}"
      raise InputError(
        f"{name} is {metrics[name]} at step {step}; "
        f"{saved if last_saved else 'no checkpoint yet'}; lower config.learning_rate, "
        "or check the cache"
      )


def describe(
  config: RunConfig,
  pipeline: Pipeline,
  cache: PairCache,
  mesh: Mesh,
  state: TrainState,
) -> str:
  """What a run will do, with the numbers that decide whether it learns."""
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
    "loss": config.dpo.loss
    + (f", β {config.dpo.beta:g} in σ(−½β·gap)" if config.dpo.loss == "dpo" else ""),
    "batch": f"{config.batch_size} pairs = {config.accumulation} × "
    f"{config.batch_size // config.accumulation}, {jax.process_count()} process(es) × "
    f"{jax.local_device_count()} {device}, mesh {dict(mesh.shape)}",
    "rate": f"{config.optimizer} {rate:.3g}"
    + (f" = {config.learning_rate:g} × {config.batch_size}" if config.scale_lr else "")
    + f", {config.warmup_steps} warm-up steps, then {config.schedule}, "
    + f"{config.steps} steps",
  }
  return "\n".join(f"{name:6} {row}" for name, row in rows.items())
