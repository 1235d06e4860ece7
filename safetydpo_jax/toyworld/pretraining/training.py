"""A training loop that can be stopped at any time and resumes where it was.

Adam with gradients clipped to norm 1, a learning rate that rises over 5 % of the steps
and falls along a cosine, and a moving average of the weights

  ema ← d ema + (1 - d) params,   d = min(decay, (1 + step) / (10 + step))          (1)

which is the result. All randomness is a function of (seed, step), so a stopped run ends
with the same weights as one that was not. Progress is saved by
`training/checkpoint.py`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from safetydpo_jax.errors import InputError
from safetydpo_jax.lora import Tree
from safetydpo_jax.training import checkpoint

WARM_UP = 0.05
BETAS = (0.9, 0.99)

Loss = Callable[[Tree, jax.Array, Any], jax.Array]
Evaluate = Callable[[Tree, int], None]


class Run(NamedTuple):
  """One stage's settings."""

  name: str
  steps: int
  learning_rate: float
  ema_decay: float
  seed: int
  progress: Path  # the folder that a stopped run resumes from
  save_every: float = 180  # seconds
  log_every: float = 30  # seconds
  evaluate_every: int = 1000  # steps


class State(NamedTuple):
  """What training changes."""

  params: Tree
  ema: Tree
  optimizer: optax.OptState


class Progress(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    state: after the checkpoint's step.
    seconds: spent by all processes so far, () float32.
    loss: of the last report, () float32.
  """

  state: State
  seconds: jax.Array
  loss: jax.Array


def make_optimizer(run: Run) -> optax.GradientTransformation:
  """Adam as this module's docstring describes it."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, run.learning_rate, max(1, int(WARM_UP * run.steps)), run.steps
  )
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, *BETAS))


def train(
  run: Run,
  params: Tree,
  loss: Loss,
  data: Any,
  evaluate: Evaluate | None = None,
) -> tuple[Tree, dict[str, Any]]:
  """Minimises `loss` and returns the averaged weights of equation (1).

  Args:
    run: the settings.
    params: the initial tree.
    loss: (params, key, data) → scalar; draws its own batch from `data` by `key`.
    data: a tree of arrays, put on the device once.
    evaluate: called with (averaged weights, steps done) now and then, and at the end.

  Returns:
    (weights, {'loss' of the last report, 'seconds' of all processes, 'steps'}).

  Raises:
    InputError: the progress is that of another seed, another model or a longer run, or
      a file of version 0.1.0.
  """
  old = run.progress.with_suffix(".npz")
  if old.exists() and not run.progress.exists():
    raise InputError(
      f"{old} is progress of version 0.1.0, which this version cannot resume; delete "
      "it to train from the start, or choose another --workdir"
    )
  optimizer = make_optimizer(run)
  data = jax.device_put(data)
  # Copies, so that donation never deletes the caller's arrays, nor one array twice.
  state = jax.tree.map(jnp.array, State(params, params, optimizer.init(params)))
  checkpoints = checkpoint.open_checkpoints(run.progress)
  settings = {"stage": run.name, "seed": run.seed}

  def update(state: State, step: int, data: Any) -> tuple[State, jax.Array]:
    key = jax.random.fold_in(jax.random.key(run.seed), step)
    value, gradient = jax.value_and_grad(loss)(state.params, key, data)
    change, slots = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, change)
    decay = jnp.minimum(run.ema_decay, (1.0 + step) / (10.0 + step))
    ema = optax.tree.update_moment(params, state.ema, decay, order=1)
    return State(params, ema, slots), value

  jitted = jax.jit(update, donate_argnums=0)
  with checkpoints:
    start, progress = _restore(run, checkpoints, state, settings)
    state, spent, mean = progress.state, float(progress.seconds), progress.loss
    losses: list[jax.Array] = []
    begin = logged = saved = time.monotonic()
    reported = start
    for step in range(start, run.steps):
      state, value = jitted(state, step, data)
      losses.append(value)
      done, now = step + 1, time.monotonic()
      last = done == run.steps
      if now - logged > run.log_every or last:
        mean = jnp.mean(jnp.stack(losses))
        rate = (done - reported) / (time.monotonic() - logged)
        left = (run.steps - done) / rate / 60
        print(
          f"{run.name} step {done}/{run.steps}  loss {float(mean):.4f}  "
          f"{rate:.2f} steps/s  {left:.0f} min left",
          flush=True,
        )
        losses, logged, reported = [], time.monotonic(), done
      if now - saved > run.save_every or last:
        seconds = jnp.float32(spent + time.monotonic() - begin)
        progress = Progress(state, seconds, jnp.asarray(mean))
        checkpoint.save(checkpoints, done, progress, settings)
        checkpoints.wait_until_finished()  # the next step overwrites the state
        saved = time.monotonic()
      if evaluate and (done % run.evaluate_every == 0 or last):
        evaluate(state.ema, done)
  if start == run.steps and evaluate:
    evaluate(state.ema, start)
  seconds = spent + time.monotonic() - begin
  return state.ema, {
    "loss": float(mean),
    "seconds": round(seconds),
    "steps": run.steps,
  }


def _restore(
  run: Run,
  checkpoints: ocp.CheckpointManager,
  state: State,
  settings: dict[str, Any],
) -> tuple[int, Progress]:
  """Steps done and what the newest checkpoint holds; 0 and `state` without one.

  Raises:
    InputError: the checkpoint is of another seed, another model or a longer run.
  """
  begin = Progress(state, jnp.float32(0), jnp.float32(jnp.nan))
  step = checkpoints.latest_step()
  if step is None:
    return 0, begin
  if step > run.steps:
    raise InputError(
      f"{run.progress} is at step {step}; expected at most {run.steps} steps; delete "
      "the folder to start again"
    )
  progress = checkpoint.restore(checkpoints, begin, settings)
  print(f"{run.name}: resuming from step {step}", flush=True)
  return step, progress
