"""A training loop that can be stopped at any time and goes on where it was.

Adam with gradients clipped to norm 1, a learning rate that rises over 5 % of the steps
and falls along a cosine, and a moving average of the weights

  ema ← d ema + (1 - d) params,   d = min(decay, (1 + step) / (10 + step))          (1)

which is what is kept. All randomness is a function of (seed, step), so a run that was
stopped ends with the same weights as one that was not. Progress is saved through a
temporary name and a rename.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files

WARM_UP = 0.05
BETAS = (0.9, 0.99)


class Run(NamedTuple):
  """One stage's settings."""

  name: str
  steps: int
  learning_rate: float
  ema_decay: float
  seed: int
  progress: Path  # the file that a stopped run goes on from
  save_every: float = 180  # seconds
  log_every: float = 30  # seconds
  evaluate_every: int = 1000  # steps


class State(NamedTuple):
  params: Any
  ema: Any
  optimizer: Any


def _optimizer(run: Run) -> optax.GradientTransformation:
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, run.learning_rate, max(1, int(WARM_UP * run.steps)), run.steps
  )
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, *BETAS))


def train(
  run: Run,
  params: Any,
  loss: Callable[[Any, jax.Array, Any], jax.Array],
  data: Any,
  evaluate: Callable[[Any, int], None] | None = None,
) -> tuple[Any, dict[str, float]]:
  """Minimises `loss` and returns the averaged weights of equation (1).

  Args:
    run: the settings.
    params: the initial tree.
    loss: (params, key, data) → scalar; draws its own batch from `data` by `key`.
    data: a tree of arrays, put on the device once.
    evaluate: called with (averaged weights, steps done) now and then, and at the end.

  Returns:
    (weights, {'loss' of the last report, 'seconds' of all processes, 'steps'}).
  """
  optimizer = _optimizer(run)
  data = jax.device_put(data)
  state = State(params, params, optimizer.init(params))
  start, state, spent, mean = _restore(run, state)
  # Copies, so that donation never deletes the caller's arrays, nor one array twice.
  state = jax.tree.map(jnp.array, state)

  def update(state, step, data):
    key = jax.random.fold_in(jax.random.key(run.seed), step)
    value, gradient = jax.value_and_grad(loss)(state.params, key, data)
    change, slots = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, change)
    decay = jnp.minimum(run.ema_decay, (1.0 + step) / (10.0 + step))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return State(params, ema, slots), value

  update = jax.jit(update, donate_argnums=0)
  losses = []
  begin = logged = saved = time.monotonic()
  reported = start
  for step in range(start, run.steps):
    state, value = update(state, step, data)
    losses.append(value)
    done, now = step + 1, time.monotonic()
    last = done == run.steps
    if now - logged > run.log_every or last:
      mean = float(jnp.mean(jnp.stack(losses)))
      rate = (done - reported) / (time.monotonic() - logged)
      left = (run.steps - done) / rate / 60
      print(
        f"{run.name} step {done}/{run.steps}  loss {mean:.4f}  {rate:.2f} steps/s"
        f"  {left:.0f} min left",
        flush=True,
      )
      losses, logged, reported = [], time.monotonic(), done
    if now - saved > run.save_every or last:
      _save(run, done, state, spent + time.monotonic() - begin, mean)
      saved = time.monotonic()
    if evaluate and (done % run.evaluate_every == 0 or last):
      evaluate(state.ema, done)
  if start == run.steps and evaluate:
    evaluate(state.ema, start)
  seconds = spent + time.monotonic() - begin
  return state.ema, {"loss": mean, "seconds": round(seconds), "steps": run.steps}


def _save(run: Run, step: int, state: State, seconds: float, loss: float) -> None:
  """Writes step, seed, time, loss and every array of the state, leaf by leaf."""
  leaves = {f"leaf_{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
  about = {"step": step, "seed": run.seed, "seconds": seconds, "loss": loss}
  with files.writing(run.progress) as temporary, open(temporary, "wb") as file:
    np.savez(file, **about, **leaves)


def _restore(run: Run, state: State) -> tuple[int, State, float, float]:
  """(steps done, state, seconds spent, loss), from the progress file if there is one.

  Raises:
    InputError: the file belongs to another seed, another model or a longer run.
  """
  if not run.progress.exists():
    return 0, state, 0.0, float("nan")
  leaves, structure = jax.tree.flatten(state)
  with np.load(run.progress) as saved:
    step, seed = int(saved["step"]), int(saved["seed"])
    seconds, loss = float(saved["seconds"]), float(saved["loss"])
    found = [saved[f"leaf_{i}"] for i in range(len(saved.files) - 4)]
  same = [x.shape for x in found] == [np.shape(x) for x in leaves]
  if not same or seed != run.seed or step > run.steps:
    raise InputError(
      f"{run.progress} holds step {step} of a run with seed {seed}"
      f"{'' if same else ' and another model'}; expected seed {run.seed} and at most "
      f"{run.steps} steps; delete it to start anew"
    )
  print(f"{run.name}: going on from step {step}", flush=True)
  return step, jax.tree.unflatten(structure, found), seconds, loss
