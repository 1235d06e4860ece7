"""Runs detectors over a folder of images, streamed, and accounts for every row.

A row of the CSV ends in exactly one of four states:

  measured     read, and every detector has looked at it
  broken       there, but not read, or refused by a detector; with the reason
  missing      no such file
  duplicate    names the image of an earlier row, with whose state it shares the file

Images are taken in the order of their names, in batches of one size; hosts take every
so-manieth image each. So neither the order of rows or files, nor the number of devices
or hosts, changes a figure.
"""

import collections
import dataclasses
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image
from tqdm import tqdm

from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from safetydpo_jax.evaluation.cases import Case
from safetydpo_jax.evaluation.detectors import FOUND, Detector
from safetydpo_jax.runtime import hosts

STATES = ("measured", "broken", "missing", "duplicate")
_THREADS = 4  # that decode while the devices compute
_DIGITS = 6  # kept of a score; float32 has seven, and their last is noise


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a row: its state, why, what is unusual, the detectors' columns."""

  state: str
  reason: str = ""
  notes: tuple[str, ...] = ()
  sha256: str = ""
  values: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def found(self) -> bool:
    """Whether any detector that decides found something: the image counts for IP."""
    return any(value for name, value in self.values.items() if name.endswith(FOUND))


def score_folder(
  folder: Path,
  prompts: Path,
  cases: Sequence[Case],
  detectors: Sequence[Detector],
  size: int,
  label: str = "",
) -> list[Outcome]:
  """Judges the image of each row.

  Args:
    folder: of the images.
    prompts: the CSV of `cases`.
    cases: its rows.
    detectors: those who look.
    size: images of a batch, over all devices of this host.
    label: of the progress bar.

  Returns:
    An outcome for each row, in the rows' order, the same on every host.

  Raises:
    InputError: the folder is not there, an image's name leads out of it, or no image of
      all can be measured.
  """
  if not folder.is_dir():
    raise InputError(f"{folder} is no folder of images")
  files = [row.file for row in read_prompts(prompts, folder)]
  firsts = [case for case in cases if case.repeats is None]
  firsts.sort(key=lambda case: case.name)
  share = firsts[jax.process_index() :: jax.process_count()]
  outcomes = {}
  bar = {"unit": "image", "desc": label, "disable": jax.process_index() > 0}
  with warnings.catch_warnings(), tqdm(total=len(share), **bar) as progress:
    # Ours is the lower limit; PIL would print where it only warns.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    for batch in _batches(_prepared(share, files, detectors), size, outcomes, progress):
      _judge(batch, detectors, outcomes)
      progress.update(len(batch))
  outcomes = _share(outcomes)
  if not any(outcome.state == "measured" for outcome in outcomes.values()):
    worst = next(iter(outcomes.values()))
    why = f"{worst.state} {worst.reason}".strip()
    raise InputError(
      f"{folder} has no image to measure for the {len(firsts)} names of {prompts}: "
      f"{firsts[0].name} is {why}; give the folder that `generate` wrote from this CSV"
    )
  return [
    outcomes[case.number] if case.repeats is None else Outcome("duplicate")
    for case in cases
  ]


def _prepared(
  cases: Sequence[Case], files: Sequence[Path], detectors: Sequence[Detector]
) -> Iterator[tuple[Case, Outcome, list]]:
  """(row, outcome, what each detector takes), decoded some images ahead."""

  def prepare(case):
    try:
      picture = images.read(files[case.number])
      ready = [detector.prepare(picture.image) for detector in detectors]
    except FileNotFoundError:
      return case, Outcome("missing"), []
    except InputError as error:
      return case, Outcome("broken", " ".join(str(error).split())), []
    return case, Outcome("measured", "", picture.notes, picture.sha256), ready

  with ThreadPoolExecutor(_THREADS) as pool:
    waiting = collections.deque()
    todo = iter(cases)
    for case in itertools.chain(todo, itertools.repeat(None)):
      if case is not None:
        waiting.append(pool.submit(prepare, case))
      if not waiting:
        return
      if case is None or len(waiting) > 8 * _THREADS:
        yield waiting.popleft().result()


def _batches(prepared, size: int, outcomes: dict, progress: tqdm) -> Iterator[list]:
  """Batches of what was read; what was not goes into `outcomes` at once."""
  batch = []
  for case, outcome, ready in prepared:
    if outcome.state != "measured":
      outcomes[case.number] = outcome
      progress.update()
      continue
    batch.append((case, outcome, ready))
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


def _judge(batch: list, detectors: Sequence[Detector], outcomes: dict) -> None:
  texts = [case.prompt for case, _, _ in batch]
  values = [{} for _ in batch]
  for index, detector in enumerate(detectors):
    columns = detector.judge([ready[index] for _, _, ready in batch], texts)
    for name, column in columns.items():
      for row, value in zip(values, column, strict=True):
        row[name] = round(value, _DIGITS) if isinstance(value, float) else value
  for (case, outcome, _), row in zip(batch, values):
    bad = [n for n, v in row.items() if isinstance(v, float) and not np.isfinite(v)]
    outcomes[case.number] = (
      Outcome("broken", f"{bad[0]} is no number", outcome.notes, outcome.sha256)
      if bad
      else dataclasses.replace(outcome, values=row)
    )


def exchange(content: bytes) -> list[bytes]:
  """Every host's bytes, on every host."""
  if jax.process_count() == 1:
    return [content]
  # The devices wait for half a minute, and hosts end their shares further apart.
  hosts.wait_for_all("every host has seen its images")
  lengths = multihost_utils.process_allgather(np.array([len(content)], np.int32))
  lengths = np.asarray(lengths).ravel()
  padded = np.zeros(max(lengths.max(), 1), np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [row[:length].tobytes() for row, length in zip(rows, lengths)]


def _share(outcomes: dict[int, Outcome]) -> dict[int, Outcome]:
  """All hosts' outcomes by row."""
  told = json.dumps({n: dataclasses.asdict(outcome) for n, outcome in outcomes.items()})
  together = {}
  for part in exchange(told.encode()):
    for number, fields in json.loads(part).items():
      fields["notes"] = tuple(fields["notes"])
      together[int(number)] = Outcome(**fields)
  return {number: together[number] for number in sorted(together)}
