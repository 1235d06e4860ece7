"""Named prompt sets: where each comes from, and how its file becomes our prompts CSV.

The package contains none of them. Users put their downloads into one folder, a set's
file under the set's name (`i2p.csv`), or several in a folder of that name (`ud/*.txt`):

  .csv, .tsv   the prompt's column is the first of `Benchmark.prompt` that exists
  .txt         a prompt per line; rename a CSV without a header to this
  .json        COCO's annotations: one caption per image, that of the lowest id
  .parquet     as .csv

Rows of failed attacks (in SneakyPrompt's results, `result_type` does not begin with
"Successful") and rows without a prompt are left out, and counted.

A row's category is its column category, categories or source; else, in a set of several
files, the file's name. A category that contains "coco" marks a benign prompt. The CSV
has the columns prompt, image, category, evaluation_seed and benign (`cases.py`).
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files

COLUMNS = ("prompt", "image", "category", "evaluation_seed", "benign")
SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".parquet")
_CATEGORY = ("category", "categories", "source")
_SEED = ("evaluation_seed", "sd_seed", "seed")
_LARGEST = 2_000_000_000  # bytes; COCO's captions have 60 million


class Benchmark(NamedTuple):
  """A prompt set.

  Attributes:
    title: its name in papers.
    kind: "harm" (IP), "attack" (attack success rate) or "utility" (FID, CLIPScore).
    rows: how many prompts were published, None where that varies.
    source: where to get it, or how to make it.
    licence: as its authors state it.
    prompt: columns that may hold the prompt, in order of preference.
  """

  title: str
  kind: str
  rows: int | None
  source: str
  licence: str
  prompt: tuple[str, ...] = ("prompt",)


BENCHMARKS = {
  "i2p": Benchmark(
    "I2P",
    "harm",
    4703,
    "huggingface.co/datasets/AIML-TUDA/i2p, i2p_benchmark.csv",
    "MIT",
  ),
  "ud": Benchmark(
    "UD",
    "harm",
    1434,
    "zenodo.org/record/8255664 (Unsafe Diffusion): 4chan, lexica, template, coco",
    "on request, for research",
  ),
  "coprov2": Benchmark(
    "CoProV2",
    "harm",
    8000,
    "github.com/Visualignment/SafetyDPO, data/CoProv2_test.csv",
    "MIT",
  ),
  "ring_a_bell": Benchmark(
    "Ring-A-Bell",
    "attack",
    None,
    "huggingface.co/datasets/Chia15/RingABell-Nudity",
    "see there",
    ("sensitive prompt", "adv_prompt", "prompt"),
  ),
  "sneakyprompt": Benchmark(
    "SneakyPrompt",
    "attack",
    None,
    "github.com/Yuchen413/text2image_safety, run against a safety filter: the .csv "
    "that it writes to results/",
    "see there",
    ("perturbed_text", "adv_prompt", "prompt"),
  ),
  "mma_diffusion": Benchmark(
    "MMA-Diffusion",
    "attack",
    1000,
    "huggingface.co/datasets/YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark",
    "on request, for research",
    ("adv_prompt", "prompt"),
  ),
  "p4d": Benchmark(
    "P4D",
    "attack",
    None,
    "huggingface.co/datasets/joycenerd/p4d",
    "see there",
    ("adv_prompt", "prompt"),
  ),
  "unlearn_diff_atk": Benchmark(
    "UnlearnDiffAtk",
    "attack",
    142,
    "github.com/OPTML-Group/Diffusion-MU-Attack, run against your own model: it makes "
    "adv_prompt from prompts/nudity.csv, whose column prompt is plain I2P",
    "MIT",
    ("adv_prompt",),  # `prompt` is what the attack starts from
  ),
  "coco": Benchmark(
    "COCO",
    "utility",
    None,
    "cocodataset.org, annotations/captions_val2014.json",
    "CC BY 4.0 (annotations)",
    ("prompt", "caption"),
  ),
}


def locate(folder: Path) -> dict[str, list[Path]]:
  """The sets in a folder, in the order of `BENCHMARKS`, with their files.

  Raises:
    InputError: there are none, or one is there twice: as two files, or a file and a
      folder.
  """
  found = {}
  for name in BENCHMARKS:
    files = [folder / (name + suffix) for suffix in SUFFIXES]
    files = [file for file in files if file.is_file()]
    if (folder / name).is_dir():
      files.append(folder / name)
    if len(files) > 1:
      raise InputError(
        f"{folder} has both {files[0].name} and {files[1].name}; keep one of them"
      )
    if files and files[0].is_dir():
      files = [f for f in files[0].iterdir() if f.suffix.lower() in SUFFIXES]
    if files:
      found[name] = sorted(files)
  if not found:
    raise InputError(
      f"--sets {folder} contains no prompt set; expected files such as i2p.csv (from "
      f"{BENCHMARKS['i2p'].source}), named after {', '.join(BENCHMARKS)}"
    )
  return found


def load(name: str, files: list[Path]) -> tuple[list[dict[str, Any]], int]:
  """A set's rows with the columns `COLUMNS`, and how many were left out.

  Raises:
    InputError: a file cannot be read, or has no column with prompts.
  """
  rows, left_out = [], 0
  for file in files:
    for cells in _read(file):
      column = next((c for c in BENCHMARKS[name].prompt if c in cells), None)
      if column is None:
        raise InputError(
          f"{file} has columns {', '.join(map(str, cells))[:200]}; expected one of "
          f"{', '.join(BENCHMARKS[name].prompt)} for {BENCHMARKS[name].title}, from "
          f"{BENCHMARKS[name].source}"
        )
      # A failed attack may still list its best try. If this column is empty, another
      # one's prompt would be the original.
      result = str(cells.get("result_type") or "Successful")
      if not cells[column] or not result.startswith("Successful"):
        left_out += 1
        continue
      category = _first(cells, _CATEGORY) or (file.stem if len(files) > 1 else "")
      benign = BENCHMARKS[name].kind == "utility" or "coco" in category.lower()
      seed = _first(cells, _SEED)
      number = len(rows)
      rows.append(
        {
          "prompt": str(cells[column]),
          "image": f"{number:07d}_0.png",
          # "all" has a meaning of its own in the figures.
          "category": category if category.lower() != "all" else "",
          "evaluation_seed": _seed(seed, number),
          "benign": int(benign),
        }
      )
  if not rows:
    raise InputError(f"{files[0]} contains no prompts for {BENCHMARKS[name].title}")
  return rows, left_out


def _first(cells: dict[str, Any], columns: tuple[str, ...]) -> str:
  """The first of the columns that is not empty, as text."""
  values = (cells.get(column) for column in columns)
  return next((str(v).strip() for v in values if v not in (None, "")), "")


def _seed(text: str, number: int) -> int:
  """The published seed if it is a whole number, else the row's number."""
  text = text.removesuffix(".0")
  return int(text) if re.fullmatch(r"\d{1,18}", text) else number


def _read(file: Path) -> Iterator[dict[str, Any]]:
  """The rows of a file as {column: value}."""
  reader = _READERS[file.suffix.lower()]
  try:
    if file.stat().st_size > _LARGEST:
      raise InputError(f"{file} has more than {_LARGEST:,} bytes; split it")
    yield from reader(file)
  except InputError:
    raise
  except Exception as error:  # pyarrow and json raise anything for a damaged file
    raise InputError(f"cannot read {file} as {file.suffix}: {error}") from error


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
  with open(file, newline="", encoding="utf-8-sig") as lines:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    for number, cells in enumerate(csv.DictReader(lines, delimiter=delimiter)):
      if None in cells:
        raise InputError(
          f"{file} row {number + 1} has more fields than the header; put prompts with "
          "commas in quotes"
        )
      yield cells


def _read_text(file: Path) -> Iterator[dict[str, Any]]:
  for line in file.read_text(encoding="utf-8-sig").split("\n"):
    if line.strip():
      yield {"prompt": line.strip()}


def _read_coco(file: Path) -> Iterator[dict[str, Any]]:
  first: dict[int, dict] = {}
  for note in json.loads(file.read_text(encoding="utf-8"))["annotations"]:
    image = int(note["image_id"])
    if image not in first or note["id"] < first[image]["id"]:
      first[image] = note
  for image in sorted(first):
    yield {"prompt": str(first[image]["caption"]).strip(), "evaluation_seed": image}


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
  import pyarrow.parquet  # Imported here: it takes a second, and few sets are parquet.

  names = pyarrow.parquet.read_schema(file).names
  wanted = {c for b in BENCHMARKS.values() for c in b.prompt} | {*_CATEGORY, *_SEED}
  wanted.add("result_type")
  columns = [name for name in names if name in wanted] or names[:1]
  yield from pyarrow.parquet.read_table(file, columns=columns).to_pylist()


_READERS = {
  ".csv": _read_csv,
  ".tsv": _read_csv,
  ".txt": _read_text,
  ".json": _read_coco,
  ".parquet": _read_parquet,
}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
  """Writes a prompts CSV."""
  files.write_csv(file, COLUMNS, rows)


def about(
  name: str, files: list[Path], rows: list[dict], left_out: int
) -> dict[str, Any]:
  """What was used, for figures.json: numbers of rows, hashes, the published number."""
  known = BENCHMARKS[name]
  return {
    "title": known.title,
    "kind": known.kind,
    "rows": len(rows),
    "left_out": left_out,
    "published_rows": known.rows,
    "benign": sum(row["benign"] for row in rows),
    "files": {
      file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    },
    "source": known.source,
    "licence": known.licence,
  }
