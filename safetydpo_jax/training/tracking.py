"""A run's metrics, in RUN/metrics.jsonl, TensorBoard events and a progress bar.

Only process 0 writes. A resumed run drops the lines after the step it resumes from,
so metrics.jsonl reads as one uninterrupted run. JSON has no NaN and no infinity; they
are written as null.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files


def to_scalars(metrics: dict[str, Any]) -> dict[str, float]:
  """Device metrics → plain floats; accuracy by timestep becomes one entry per bin."""
  metrics = {name: np.asarray(value) for name, value in metrics.items()}
  scalars = {name: float(value) for name, value in metrics.items() if not value.ndim}
  if "share_by_timestep" in metrics:
    shares, correct = metrics["share_by_timestep"], metrics["correct_by_timestep"]
    for index, (share, right) in enumerate(zip(shares, correct)):
      if share > 0:
        name = f"accuracy_timestep_quarter_{index + 1}"
        scalars[name] = float(right / share)
  return scalars


def _keep_until(path: Path, step: int) -> None:
  """Drops the lines of `path` after `step`, and a last line cut short by a kill."""
  lines = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      if json.loads(line)["step"] > step:
        break
    except (json.JSONDecodeError, KeyError, TypeError):
      break
    lines.append(line + "\n")
  files.write_text(path, "".join(lines))


class Tracker:
  """Writes the metrics of one run; does nothing on processes other than 0.

  A line holds the mean over the steps since the line before: one batch of 16 pairs
  says little about accuracy. Step 1 has a line of its own: there the margin is nothing
  but rounding.
  """

  def __init__(
    self, workdir: Path, start_step: int, steps: int, batch_size: int, log_every: int
  ):
    """Opens the files; `batch_size` in pairs turns step rates into pairs/s."""
    self.active = jax.process_index() == 0
    self.steps, self.batch_size, self.log_every = steps, batch_size, log_every
    self.window: list[dict[str, Any]] = []
    if not self.active:
      return
    path = Path(workdir) / "metrics.jsonl"
    try:
      if path.exists():
        _keep_until(path, start_step)
      self.lines = path.open("a", buffering=1)
    except OSError as error:
      raise InputError(f"cannot write {path}: {error.strerror}") from error
    # Here, as it imports PyTorch where that is installed: seconds, also of `--help`.
    from tensorboardX import SummaryWriter

    self.events = SummaryWriter(
      str(Path(workdir) / "tensorboard"), purge_step=start_step + 1
    )
    self.bar = tqdm(
      initial=start_step, total=steps, unit="step", mininterval=1.0, dynamic_ncols=True
    )

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of `step`; writes a line when one is due."""
    if not self.active:
      return
    self.window.append(metrics)
    if step % self.log_every == 0 or step in (1, self.steps):
      means = {
        name: np.mean([one[name] for one in self.window], axis=0) for name in metrics
      }
      self.window.clear()
      self._write(step, to_scalars(means))
    rate = self.bar.format_dict["rate"]
    self.bar.update()
    self.bar.set_postfix(
      {
        "loss": f"{float(metrics['loss']):.4f}",
        "pairs/s": f"{rate * self.batch_size:.1f}" if rate else "?",
      },
      refresh=False,
    )

  def _write(self, step: int, scalars: dict[str, float]) -> None:
    line = {
      name: value if math.isfinite(value) else None for name, value in scalars.items()
    }
    self.lines.write(json.dumps({"step": step, **line}) + "\n")
    for name, value in scalars.items():
      self.events.add_scalar(name, value, step)

  def __enter__(self) -> "Tracker":
    return self

  def __exit__(self, *error: Any) -> None:
    """Flushes and closes everything."""
    if self.active:
      self.bar.close()
      self.lines.close()
      self.events.close()
