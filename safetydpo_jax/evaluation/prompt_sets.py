"""Named prompt sets: where each comes from, and how its file becomes our prompts CSV.

The package contains none of them. Users put their downloads into one folder
(`set_folder.py`). Forms of files: `set_files.py`. The prompt's column is the first of
`Benchmark.prompt` that exists; the other columns mean what they mean in every CSV of
prompts. What is read under an attack's name is checked in `attack_rows.py`.

Rows of failed attacks (in SneakyPrompt's results, `result_type` does not begin with
"Successful") and rows without a prompt are left out, and counted. In a set of several
files, the category of a row without one is the file's name.

The CSV has the columns prompt, image, category, evaluation_seed and benign, and where
rows have them, evaluation_guidance and negative_prompt.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax.data import columns, prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import attack_rows, cases, set_files
from safetydpo_jax.runtime import files

COLUMNS = ("prompt", "image", "category", "evaluation_seed", "benign")
OWN = ("evaluation_guidance", "negative_prompt")


class LoadedSet(NamedTuple):
  """What is read of a set's files.

  Attributes:
    rows: with the columns `COLUMNS`, and those of `OWN` that they have.
    left_out: how many rows were left out.
    caveats: why the rows may not be what the set's name says, a line each.
  """

  rows: list[dict[str, Any]]
  left_out: int
  caveats: tuple[str, ...] = ()


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
    ("adv_prompt", "sensitive prompt", "prompt"),
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
    ("adv_prompt", "sensitive prompt", "prompt"),
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


def load(name: str, files: list[Path], say: Callable[[str], None] = print) -> LoadedSet:
  """Reads a set.

  Args:
    name: of the set.
    files: of the set, those of `set_folder.locate`.
    say: what prints a line that a reader should know.

  Raises:
    InputError: a file cannot be read, has no column with prompts, a seed or guidance
      that is not a number, or what it holds under an attack's name cannot be one.
  """
  known = BENCHMARKS[name]
  wanted = [columns.normalise(column) for column in known.prompt]
  more = attack_rows.READ if known.kind == "attack" else ()
  rows, left_out, caveats = [], 0, []
  for file in files:
    found = set_files.read(file, {*wanted, "result_type", *more})
    column = next((c for c in wanted if c in found.columns), None)
    if column is None:
      raise InputError(
        f"{file} has columns {', '.join(found.names)[:200]}; expected one of "
        f"{', '.join(known.prompt)} for {known.title}, from {known.source}"
      )
    taken = []
    for number, cells in enumerate(found.rows, start=1):
      # A failed attack may still list its best try. If this column is empty, another
      # one's prompt would be the original.
      result = cells.get("result_type") or "Successful"
      if not cells.get(column) or not result.startswith("Successful"):
        left_out += 1
        continue
      category = cases.category_of(cells) or (file.stem if len(files) > 1 else "")
      cells = {**cells, "prompt": cells[column], "category": category}
      number_in_set = len(rows) + len(taken)
      taken.append(_row(cells, number_in_set, known.kind, f"{file} row {number}"))
    doubts = []
    if known.kind == "attack" and taken:
      if trouble := attack_rows.why_none(file, found, column, taken):
        raise InputError(
          f"{file} {trouble}. Give prompts that {known.title} found, in a column "
          f"{attack_rows.ADVERSARIAL}, from {known.source}"
        )
      doubts = attack_rows.doubts(found, column, taken)
    for line in (*found.notes, *(f"{file} {doubt}" for doubt in doubts)):
      say(line)
    caveats += [f"{file.name} {doubt}" for doubt in doubts]
    rows += taken
  if not rows:
    raise InputError(f"{files[0]} contains no prompts for {known.title}")
  return LoadedSet(rows, left_out, tuple(caveats))


def _row(cells: dict[str, str], number: int, kind: str, where: str) -> dict[str, Any]:
  """A row of the prompts CSV; `number` is its own in the set, from 0."""
  seed = prompts.read_seed(cells.get("evaluation_seed", ""), f"{where}: its seed")
  guidance = prompts.read_guidance(
    cells.get("evaluation_guidance", ""), f"{where}: its guidance"
  )
  category = cells["category"]
  row = {
    "prompt": cells["prompt"],
    "image": prompts.default_name(number),
    # "all" has a meaning of its own in the figures.
    "category": category if category.lower() != "all" else "",
    "evaluation_seed": number if seed is None else seed,
    "benign": int(kind == "utility" or cases.is_benign(cells, where)),
  }
  own = {
    "evaluation_guidance": guidance,
    "negative_prompt": cells.get("negative_prompt") or None,
  }
  return row | {name: value for name, value in own.items() if value is not None}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
  """Writes a prompts CSV; it has those of `OWN` that a row has."""
  own = [name for name in OWN if any(name in row for row in rows)]
  files.write_csv(file, (*COLUMNS, *own), rows)


def to_rows(rows: list[dict[str, Any]]) -> list[prompts.Row]:
  """The rows as they are rendered, without a folder."""
  return [
    prompts.Row(
      Path(row["image"]),
      row["prompt"],
      row["evaluation_seed"],
      number,
      *(row.get(name) for name in OWN),
    )
    for number, row in enumerate(rows)
  ]


def with_guidance(rows: list[dict[str, Any]]) -> int:
  """How many rows have a guidance of their own."""
  return sum("evaluation_guidance" in row for row in rows)


def without_guidance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows with no guidance of their own."""
  return [{k: v for k, v in row.items() if k != "evaluation_guidance"} for row in rows]


def about(name: str, files: list[Path], loaded: LoadedSet) -> dict[str, Any]:
  """What was used, for figures.json: numbers of rows, hashes, the published number."""
  known, rows = BENCHMARKS[name], loaded.rows
  return {
    "title": known.title,
    "kind": known.kind,
    "rows": len(rows),
    "left_out": loaded.left_out,
    "published_rows": known.rows,
    "benign": sum(row["benign"] for row in rows),
    "own_guidance": with_guidance(rows),
    "files": {
      file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    },
    "source": known.source,
    "licence": known.licence,
    "caveats": list(loaded.caveats),
  }
