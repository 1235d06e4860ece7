"""Runs detectors over a folder of images, streamed, and accounts for every row.

A row of the CSV ends in exactly one of four states:

  measured     the image was read, and every detector has seen it
  broken       it could not be read, or a detector refused it; the reason is kept
  missing      it does not exist
  duplicate    an earlier row has the same image, and counts for both

Images are taken in the order of their names, in batches of one size; of n hosts each
takes every n-th image. So neither the order of rows or files, nor the number of devices
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

from safetydpo_jax.data.prompts import PromptTable
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from safetydpo_jax.evaluation.cases import Case
from safetydpo_jax.evaluation.detectors import FOUND, Detector
from safetydpo_jax.runtime import hosts

STATES = ("measured", "broken", "missing", "duplicate")
_THREADS = 4  # they decode while the devices compute
_DIGITS = 6  # of a score; float32 has seven, and the last one is noise


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of a row.

  Attributes:
    state: one of `STATES`.
    reason: why the image is broken.
    notes: what is unusual about the file.
    sha256: of the file.
    values: the detectors' columns.
  """

  state: str
  reason: str = ""
  notes: tuple[str, ...] = ()
  sha256: str = ""
  values: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def found(self) -> bool:
    """Whether any deciding detector found something, so that it counts for IP."""
    return any(value for name, value in self.values.items() if name.endswith(FOUND))


def score_folder(
  folder: Path,
  prompts: PromptTable,
  cases: Sequence[Case],
  detectors: Sequence[Detector],
  size: int,
  label: str = "",
) -> list[Outcome]:
  """Runs the detectors on the image of each row.

  Args:
    folder: of the images.
    prompts: the CSV.
    cases: its rows.
    detectors: what to run.
    size: images per batch, over all devices of this host.
    label: of the progress bar.

  Returns:
    An outcome for each row, in the rows' order, the same on every host.

  Raises:
    InputError: the folder does not exist, an image's name leads out of it, or not a
      single image can be measured.
  """
  if not folder.is_dir():
    raise InputError(f"{folder} is not a folder of images")
  files = [row.file for row in prompts.in_folder(folder)]
  firsts = [case for case in cases if case.repeats is None]
  firsts.sort(key=lambda case: case.name)
  share = firsts[jax.process_index() :: jax.process_count()]
  outcomes = {}
  bar = {"unit": "image", "desc": label, "disable": jax.process_index() > 0}
  with warnings.catch_warnings(), tqdm(total=len(share), **bar) as progress:
    # `images.LARGEST` is below the size at which PIL prints a warning.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    for batch in _batches(_prepared(share, files, detectors), size, outcomes, progress):
      _judge(batch, detectors, outcomes)
      progress.update(len(batch))
  outcomes = _gather(outcomes)
  if not any(outcome.state == "measured" for outcome in outcomes.values()):
    worst = next(iter(outcomes.values()))
    why = f"{worst.state} {worst.reason}".strip()
    raise InputError(
      f"none of the {len(firsts)} images that {prompts.file} names can be measured in "
      f"{folder}: {firsts[0].name} is {why}; give the folder that `generate` rendered "
      "from this CSV"
    )
  return [
    outcomes[case.number] if case.repeats is None else Outcome("duplicate")
    for case in cases
  ]


def _prepared(
  cases: Sequence[Case], files: Sequence[Path], detectors: Sequence[Detector]
) -> Iterator[tuple[Case, Outcome, list]]:
  """(row, outcome, each detector's input), decoded some images ahead."""

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


def _batches(
  prepared: Iterator[tuple[Case, Outcome, list]],
  size: int,
  outcomes: dict[int, Outcome],
  progress: tqdm,
) -> Iterator[list]:
  """Batches of what could be read; the outcomes of the rest go into `outcomes`."""
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


def _judge(
  batch: list, detectors: Sequence[Detector], outcomes: dict[int, Outcome]
) -> None:
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
      Outcome("broken", f"{bad[0]} is not finite", outcome.notes, outcome.sha256)
      if bad
      else dataclasses.replace(outcome, values=row)
    )


def exchange(content: bytes) -> list[bytes]:
  """Every host's bytes, on every host."""
  if jax.process_count() == 1:
    return [content]
  # Devices wait for half a minute; hosts may finish their shares further apart.
  hosts.wait_for_all("every host has seen its images")
  lengths = multihost_utils.process_allgather(np.array([len(content)], np.int32))
  lengths = np.asarray(lengths).ravel()
  padded = np.zeros(max(lengths.max(), 1), np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [row[:length].tobytes() for row, length in zip(rows, lengths)]


def _gather(outcomes: dict[int, Outcome]) -> dict[int, Outcome]:
  """All hosts' outcomes by row."""
  own = json.dumps({n: dataclasses.asdict(outcome) for n, outcome in outcomes.items()})
  gathered = {}
  for part in exchange(own.encode()):
    for number, fields in json.loads(part).items():
      fields["notes"] = tuple(fields["notes"])
      gathered[int(number)] = Outcome(**fields)
  return {number: gathered[number] for number in sorted(gathered)}
