"""What is read of other tools' checkpoints and LoRAs; the table of docs/interchange.md.

Printed by

  python -m tests.support.interchange

Tensors and layers are counted on files of the published sizes, by names and shapes
alone. Differences are measured on tiny models of the same form, with random weights:

  a checkpoint   of the UNet's prediction, relative to its largest number, here and in
                 diffusers, which reads the same file; all weights are equal
  a LoRA         of the UNet's weights, relative to their largest change, here and where
                 the tool merges the file, see `dialects.py`
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support import dialects, sizes
from tests.support.single_files import ema_name

HEADER = "tool | file | family | read of there | own result | largest difference"
USUAL = ("SD 1", "SD 2", "SDXL")
DISTILLED = ("SSD-1B", "KOALA-700M", "small-sd", "tiny-sd")


class Row(NamedTuple):
  """A kind of file.

  Attributes:
    tool, file, by: for the table; `by` gives the tool's own result.
    families: the models that are counted, of `sizes.SIZES`.
    count: one of them → (tensors or layers read, there).
    measure: an empty folder → the largest difference.
  """

  tool: str
  file: str
  families: tuple[str, ...]
  by: str
  count: Callable[[str], tuple[int, int]]
  measure: Callable[[Path], float]

  def start(self) -> str:
    """The row up to its counts."""
    return f"| {self.tool} | {self.file} | {', '.join(self.families)} | "

  def line(self) -> str:
    """The whole row, counted and measured."""
    counts = (self.count(name) for name in self.families)
    counts = ", ".join(f"{read:,} of {there:,}" for read, there in counts)
    with tempfile.TemporaryDirectory() as folder:
      difference = self.measure(Path(folder))
    shown = f"{difference:.0e}" if difference else "0"
    return f"{self.start()}{counts} | {self.by} | {shown} |"


def as_they_are(tensors: dict) -> dict:
  return tensors


def with_ema(tensors: dict) -> dict:
  """Also with the UNet's moving average, as trainers save it."""
  prefix = "model.diffusion_model."
  ema = {ema_name(name): x for name, x in tensors.items() if name.startswith(prefix)}
  return {**tensors, **ema, "model_ema.decay": torch.ones(1)}


def in_dtype(dtype: torch.dtype) -> Callable[[dict], dict]:
  def cast(tensors):
    return {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}

  return cast


def checkpoint(tool, file, families, by, count, measure) -> Row:
  """A row whose difference is the largest of its families."""

  def largest(folder):
    found = []
    for name in families:
      (folder / name).mkdir()
      found.append(measure(name, folder / name))
    return max(found)

  return Row(tool, file, families, by, count, largest)


def single_file(file, families, change=as_they_are) -> Row:
  return checkpoint(
    "Civitai, A1111, ComfyUI",
    file,
    families,
    "`from_single_file`",
    lambda name: sizes.count_single_file(name, change),
    lambda name, folder: sizes.measure_single_file(name, folder, change),
  )


def directory(families) -> Row:
  return checkpoint(
    "diffusers",
    "directory",
    families,
    "`from_pretrained`",
    sizes.count_directory,
    sizes.measure_directory,
  )


def lora(dialect: dialects.Dialect, families, tiny) -> Row:
  """A row of a dialect; `tiny` of `dialects.TINY` are measured."""

  def largest(folder):
    found = []
    for family in tiny:
      (folder / family).mkdir()
      found.append(dialects.measure(dialect, family, folder / family))
    assert all(each.read == each.there for each in found), (dialect, found)
    return max(each.difference for each in found)

  return Row(
    dialect.tool,
    dialect.kind,
    families,
    dialect.by,
    lambda name: dialects.count_names(dialect, name),
    largest,
  )


def rows() -> Iterator[Row]:
  """The table's, in order."""
  yield directory(USUAL)
  yield directory(DISTILLED)
  yield single_file("single file", USUAL)
  yield single_file("single file, EMA weights too", USUAL, with_ema)
  yield single_file("single file in float16", USUAL, in_dtype(torch.float16))
  yield single_file("single file in float8", USUAL, in_dtype(torch.float8_e4m3fn))
  yield single_file("single file", DISTILLED)
  for dialect in dialects.DIALECTS:
    yield lora(dialect, USUAL, ("SD1", "SDXL"))
  # What layers are called differs by model where they are called by their number.
  for dialect in dialects.NUMBERED:
    yield lora(dialect, DISTILLED, ("KOALA",))


def main() -> None:
  print(f"| {HEADER} |")
  print(f"|{'---|' * (HEADER.count('|') + 1)}")
  for row in rows():
    print(row.line(), flush=True)


if __name__ == "__main__":
  main()
