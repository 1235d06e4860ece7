"""Whether the rows of a file are attacks, or the prompts that attacks start from.

An attack success rate counts prompts that an attack found. Where a file has columns for
both, the one read is the attack's. Where its only column is `prompt`, the other columns
tell, as the files are published:

  I2P's, in part or renamed   where Ring-A-Bell, P4D and UnlearnDiffAtk start
                              (P4D's data/*.csv, Diffusion-MU-Attack's prompts/*.csv)
  those and nudity_toxicity   what P4D's run_p4dn.py and run_p4dk.py found: they write
                              it below the columns of the list that they start from
  normal prompt, prompt1      pairs with and without a concept: Ring-A-Bell starts from
                              them (nudity-ring-a-bell.csv of RECE and SAFREE, which
                              SAFREE renders under the attack's name; Violence_30.csv)
  case_number,                both: Ring-A-Bell's data/InvPrompt is what it found,
  evaluation_seed             data/Prompts_For_ConceptVector where it starts
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetydpo_jax.data import columns
from safetydpo_jax.evaluation import set_files

ADVERSARIAL = "adv_prompt"  # every attack's file may have its prompts in this column
# Those beside the prompt. Copies call two of them evaluation_seed and
# evaluation_guidance, as attacks' own files do.
OF_I2P = frozenset(
  (
    *("categories", "hard", "inappropriate_percentage", "nudity_percentage"),
    *("q16_percentage", "sd_safety_percentage", "prompt_toxicity", "lexica_url"),
    *("sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height", "sd_model"),
  )
)
OF_P4D, *OF_PAIRS = READ = ("nudity_toxicity", "normal_prompt", "prompt1")


def why_none(
  file: Path, found: set_files.SetFile, column: str, rows: Sequence[dict[str, Any]]
) -> str | None:
  """Why the rows cannot be attacks, to follow the file's name; None if they can.

  Args:
    file: the file.
    found: what is in it, with the columns `READ`.
    column: normalised name of the one that is read as the prompt.
    rows: those that are rendered, with "prompt" and "benign".
  """
  of_i2p = [name for name in found.names if columns.normalise(name) in OF_I2P]
  if file.suffix.lower() == ".json":
    return "holds COCO's captions"
  if column == "prompt" and of_i2p and OF_P4D not in found.columns:
    return f"has I2P's columns {', '.join(of_i2p)[:200]}: attacks start from I2P"
  if column == "prompt" and all(len(row["prompt"].split()) < 2 for row in rows):
    return "is a list of words"
  if all(row["benign"] for row in rows):
    return "has only benign rows"
  return None


def doubts(
  found: set_files.SetFile, column: str, rows: Sequence[dict[str, Any]]
) -> list[str]:
  """Why the rows may not be attacks, a line each, to follow the file's name."""
  lines = []
  pairs = [name for name in found.names if columns.normalise(name) in OF_PAIRS]
  if pairs and column != ADVERSARIAL:
    lines.append(
      f"has a column '{pairs[0]}', as in the pairs that Ring-A-Bell starts from; the "
      "success rate is that of an attack only if its prompts are what the attack found"
    )
  elif column == "prompt":
    lines.append(
      f"has no column {ADVERSARIAL}; the success rate is that of an attack only if "
      "its prompts are what the attack found, not where it starts"
    )
  if benign := sum(row["benign"] for row in rows):
    lines.append(f"has {benign} benign rows of {len(rows)}, which count as attacks")
  return lines
