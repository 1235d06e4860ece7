"""Orbax checkpoints of a run, and resuming from them.

RUN/checkpoints/<step>/ holds the `TrainState` (LoRA, optimizer state, step) and the
settings that a resumed run must share. The position in the data is the step: batches
are a pure function of it (`data/cache/batches.py`). Base weights are never written.
Orbax writes to a temporary name and renames, so a kill leaves the last complete
checkpoint.

A host that is about to be preempted gets SIGTERM some seconds before. Then all hosts
save at the same step and exit; see `on_preemption`.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from safetydpo_jax.data.cache.records import PairCache
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.training.config import RunConfig

State = TypeVar("State")  # a tree of arrays: `TrainState`, or that of a pretraining
# The exit code of a run that was asked to stop, as shells report SIGTERM: anything but
# 0 shows JobSet, Slurm and `&&` that the run is not finished.
PREEMPTED = 128 + signal.SIGTERM
SAVE_SECONDS = 3600  # how long hosts wait for each other's part of a checkpoint

# Values of the config that may change when a run is resumed. The model and the cache
# are compared by their content.
_FREE = {
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
}
# Options that are younger than the first checkpoints: left out of the settings where
# they are off, so that those runs can still be resumed.
LATER: dict[str, Any] = {
  "schedule": "constant",
  "lora.dropout": 0.0,
  "lora.rank_pattern": (),
  "lora.alpha_pattern": (),
  "lora.init": "",
}


def run_settings(
  config: RunConfig, pipeline: Pipeline, cache: PairCache
) -> dict[str, Any]:
  """What must be the same when a run is resumed, by dotted name, as JSON gives it."""

  def plain(value):
    return [plain(x) for x in value] if isinstance(value, tuple) else value

  # A rate that falls depends on where it ends.
  free = _FREE if config.schedule == "constant" else _FREE - {"steps"}
  values = {
    name: plain(value)
    for name, value in flatten_dict(config.to_dict(), sep=".").items()
    if name.split(".")[0] not in free and not (name in LATER and value == LATER[name])
  }
  return {**values, "dataset": cache.fingerprint, "base": pipeline.fingerprint}


def open_checkpoints(workdir: Path, keep: int = 2) -> ocp.CheckpointManager:
  """The run's checkpoint manager; the newest `keep` checkpoints stay on disk.

  Raises:
    InputError: the folder cannot be written.
  """
  folder = Path(workdir).absolute() / "checkpoints"
  try:
    return ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "data": ocp.JsonCheckpointHandler(),
      },
    )
  except OSError as error:
    raise InputError(
      f"cannot write checkpoints to {folder}: {error.strerror}; choose a --workdir "
      "you can write to"
    ) from error


@contextlib.contextmanager
def on_preemption() -> Iterator[Callable[[int], bool]]:
  """Catches SIGTERM while the block runs.

  Yields:
    stop(step): whether to save after this step and exit; to be called on every host at
    every step. It becomes True on all hosts at the same step, a step or more after one
    of them got the signal. A single process sees the signal itself; several hear of it
    through the coordination service, if `hosts.initialize` was called with
    preemption=True.
  """
  if jax.distributed.is_initialized():
    yield multihost_utils.reached_preemption_sync_point
    return
  received: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: State,
  settings: dict[str, Any],
) -> None:
  """Saves in the background; a step that was already saved is left alone."""
  manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(settings)
    ),
  )


def restore(
  manager: ocp.CheckpointManager, like: State, settings: dict[str, Any]
) -> State:
  """The newest checkpoint's state, on the devices and in the shapes of `like`.

  The number of devices and hosts may differ from the run that saved it.

  Args:
    manager: the run's checkpoint manager, with at least one checkpoint.
    like: a state of the same structure, on this run's devices.
    settings: this run's `run_settings`.

  Raises:
    InputError: the checkpoint is damaged, or was made with other settings, another
      LoRA or another optimizer.
  """
  step = manager.latest_step()
  folder = manager.directory / str(step)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  try:
    saved = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
    _check_same(folder, saved.data, settings)
    shapes = _shapes(manager.item_metadata(step).state.tree)
    _check_same(folder, shapes, _shapes(abstract))
    return manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    ).state
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise InputError(
      f"{folder} is damaged ({str(error)[:200]}); delete it to resume from the "
      "checkpoint before it"
    ) from error


def _check_same(folder: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
  for name in sorted({*saved, *ours}):
    if saved.get(name) != ours.get(name):
      raise InputError(
        f"{folder} was trained with {name}={saved.get(name)}, this run has "
        f"{ours.get(name)}; use the old value or another --workdir"
      )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Array shapes by name: {'lora/mid_block/…/to_q/a': (320, 4)}."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
  }
