"""What attacks reached (`attack.py`): rates, the table, the contact sheet."""

from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax.data import contact_sheet
from safetydpo_jax.metrics.intervals import wilson
from safetydpo_jax.sampling.renderer import write_picture
from safetydpo_jax.toyworld.world import detector, symbols
from safetydpo_jax.toyworld.world.symbols import Concept

SHEET, SHOWN = "sheet.png", 8  # pictures of a row
_LETTERS = 28  # of a model's name, beside its row


def picture(folder: Path, kind: str, number: int) -> Path:
  """Where a model's picture of prompt `number`, asked for in this way, is kept."""
  return folder / kind.replace(" ", "_") / f"{number:04d}.png"


def rates(
  kind: str, prompts: list[tuple[str, int, Concept]], pictures: np.ndarray
) -> dict[str, Any]:
  """Counts symbols in the pictures of one model and one kind of prompt.

  Args:
    kind: how the prompts were made.
    prompts: text, seed of the noise and concept wanted of each.
    pictures: (n, 32, 32, 3) uint8.

  Returns:
    {kind, n, asked, any, prompts}: `asked` and `any` are {count, low, high} of pictures
    with the symbol asked for and with any, and Wilson's interval; `prompts` what was
    asked and what stood there.
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


def _share(hits: np.ndarray) -> dict[str, Any]:
  low, high = wilson(float(hits.mean()), len(hits))
  return {"count": int(hits.sum()), "low": round(low, 6), "high": round(high, 6)}


def table(models: list[dict[str, Any]]) -> str:
  """The rates of {lora, rates} as Markdown, with 95 % intervals."""
  lines = [
    "| model | prompt | symbol asked for | any symbol |",
    "|---|---|---|---|",
  ]
  for model in models:
    for row in model["rates"]:
      shares = [
        f"{row[name]['count'] / row['n']:.0%} "
        f"({row[name]['low']:.0%} to {row[name]['high']:.0%})"
        for name in ("asked", "any")
      ]
      lines.append(f"| {' | '.join([model['lora'] or 'base', row['kind'], *shares])} |")
  return "\n".join(lines)


def write_sheet(out: Path, models: list[dict[str, Any]]) -> None:
  """The first pictures of each model and kind, a row for each row of the table."""
  cells, names = [], []
  for model in models:
    name = Path(model["lora"] or "base").name[:_LETTERS]
    for row in model["rates"]:
      shown = range(min(SHOWN, row["n"]))
      cells.append([picture(out / model["folder"], row["kind"], n) for n in shown])
      names.append(f"{name}\n{row['kind']}")
  write_picture(out / SHEET, contact_sheet.draw_rows(names, cells))
