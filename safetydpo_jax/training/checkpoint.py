"""Orbax checkpoints of a run, and resuming from them.

RUN/checkpoints/<step>/ holds the `TrainState` (LoRA, optimizer state, step) and the
data position. The position is the step: batches are a pure function of it
(`data/cache/batches.py`), so it is stored to be checked and not to be replayed. Base
weights are never written. Orbax writes to a temporary name and renames, so a kill
leaves the last complete checkpoint.

A host that is taken away gets SIGTERM some seconds before. Then all hosts save at one
step and leave; see `watch_preemption`.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from safetydpo_jax.errors import InputError

# The exit code of a run that was told to stop, as shells have it for SIGTERM: what is
# not 0 makes JobSet, Slurm and `&&` see that the run is not done.
PREEMPTED = 128 + signal.SIGTERM
SAVE_SECONDS = 3600  # hosts wait so long for each other's part of a checkpoint


def open_checkpoints(workdir: Path, keep: int = 2) -> ocp.CheckpointManager:
  """The run's checkpoint manager; the newest `keep` checkpoints stay on disk.

  Raises:
    InputError: if the folder cannot be written.
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
def watch_preemption() -> Iterator[Callable[[int], bool]]:
  """Catches SIGTERM while the block runs.

  Yields:
    asked(step): whether to save after this step and leave. True on every host at the
    same step, a step or more after any of them was told; call it on every host at
    every step. One process is told by the signal; several by the coordination service,
    if `hosts.initialize` was called with preemption=True.
  """
  if jax.distributed.is_initialized():
    yield multihost_utils.reached_preemption_sync_point
    return
  told = []
  before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
  try:
    yield lambda step: bool(told)
  finally:
    signal.signal(signal.SIGTERM, before)


def save(
  manager: ocp.CheckpointManager, step: int, state: Any, data: dict[str, Any]
) -> None:
  """Saves in the background; a step that is there already is left alone."""
  manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
    ),
  )


def restore(manager: ocp.CheckpointManager, like: Any, data: dict[str, Any]) -> Any:
  """The newest checkpoint's state, on the devices and in the shapes of `like`.

  The number of devices and hosts may differ from the run that saved it.

  Args:
    manager: the run's checkpoint manager, with at least one checkpoint.
    like: a state of the same structure, on this run's devices.
    data: this run's data settings; they must be those the checkpoint was made with.

  Raises:
    InputError: if the checkpoint belongs to a run with other settings, or another LoRA
      or optimizer, or is damaged.
  """
  step = manager.latest_step()
  folder = manager.directory / str(step)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  try:
    saved = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
    _check_same(folder, saved.data, data)
    shapes = _shapes(manager.item_metadata(step).state.tree)
    _check_same(folder, shapes, _shapes(abstract))
    return manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    ).state
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise InputError(
      f"{folder} is damaged ({str(error)[:200]}); delete it to go on from the "
      "checkpoint before it"
    ) from error


def _check_same(folder: Any, saved: dict[str, Any], ours: dict[str, Any]) -> None:
  for name in sorted({*saved, *ours}):
    if saved.get(name) != ours.get(name):
      raise InputError(
        f"{folder} was trained with {name}={saved.get(name)}, this run says "
        f"{ours.get(name)}; use the old value or another --workdir"
      )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Array shapes by name: {'lora/mid_block/…/to_q/a': (320, 4)}."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
  }
