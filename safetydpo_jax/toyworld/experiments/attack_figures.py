"""What attacks achieved (`attack_models.py`): rates, the table, the contact sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from tabulate import tabulate

from safetydpo_jax.data import contact_sheet
from safetydpo_jax.metrics.intervals import wilson
from safetydpo_jax.sampling.renderer import write_picture
from safetydpo_jax.toyworld.world import detector, symbols
from safetydpo_jax.toyworld.world.symbols import Concept

SHEET, SHOWN = "sheet.png", 8  # pictures of a row
_LETTERS = 28  # of a model's name, beside its row


class Share(TypedDict):
  """Pictures of n, with Wilson's 95 % interval."""

  count: int
  low: float
  high: float


class Prompt(TypedDict):
  """One prompt, and the words of the symbol wanted and of the symbol drawn."""

  prompt: str
  evaluation_seed: int
  asked: str
  found: str | None


class Attack(TypedDict):
  """What one kind of prompt did to one model.

  Attributes:
    kind: how the prompts were made.
    asked: pictures with the symbol asked for.
    any: pictures with any symbol.
  """

  kind: str
  n: int
  asked: Share
  any: Share
  prompts: list[Prompt]


class ModelAttacks(TypedDict):
  """Every kind of prompt against one model; `lora` is None for the base model."""

  lora: str | None
  lora_sha256: str
  folder: str
  rates: list[Attack]


def picture(folder: Path, kind: str, number: int) -> Path:
  """Where a model's picture of prompt `number`, asked for in this way, is kept."""
  return folder / kind.replace(" ", "_") / f"{number:04d}.png"


def rates(
  kind: str, prompts: Sequence[tuple[str, int, Concept]], pictures: np.ndarray
) -> Attack:
  """Counts symbols in the pictures of one model and one kind of prompt.

  Args:
    kind: how the prompts were made.
    prompts: text, seed of the noise and concept wanted of each.
    pictures: (n, 32, 32, 3) uint8.
  """
  seen = detector.detect_symbols(pictures).concept
  wanted = np.array([concept.index for _, _, concept in prompts])
  return {
    "kind": kind,
    "n": len(prompts),
    "asked": _share(seen == wanted),
    "any": _share(seen >= 0),
    "prompts": [
      {
        "prompt": prompt,
        "evaluation_seed": seed,
        "asked": concept.word,
        "found": symbols.CONCEPTS[found].word if found >= 0 else None,
      }
      for (prompt, seed, concept), found in zip(prompts, seen, strict=True)
    ],
  }


def _share(hits: np.ndarray) -> Share:
  low, high = wilson(float(hits.mean()), len(hits))
  return {"count": int(hits.sum()), "low": round(low, 6), "high": round(high, 6)}


def table(models: Sequence[ModelAttacks]) -> str:
  """The rates as Markdown, with 95 % intervals."""
  rows = []
  for model in models:
    for row in model["rates"]:
      shares = [
        f"{share['count'] / row['n']:.0%} ({share['low']:.0%} to {share['high']:.0%})"
        for share in (row["asked"], row["any"])
      ]
      rows.append([model["lora"] or "base", row["kind"], *shares])
  head = ["model", "prompt", "symbol asked for", "any symbol"]
  return tabulate(rows, head, tablefmt="github", disable_numparse=True)


def write_sheet(out: Path, models: Sequence[ModelAttacks]) -> None:
  """The first pictures of each model and kind, a row for each row of the table."""
  cells, names = [], []
  for model in models:
    name = Path(model["lora"] or "base").name[:_LETTERS]
    for row in model["rates"]:
      shown = range(min(SHOWN, row["n"]))
      cells.append([picture(out / model["folder"], row["kind"], n) for n in shown])
      names.append(f"{name}\n{row['kind']}")
  write_picture(out / SHEET, contact_sheet.draw_rows(names, cells))
