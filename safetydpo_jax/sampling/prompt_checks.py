"""What to know of a CSV's prompts before they are rendered: cut, weighted, not read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from safetydpo_jax.data import cleaning
from safetydpo_jax.data.prompts import Row
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.sampling import emphasis
from safetydpo_jax.sampling.inputs import wanted_of
from safetydpo_jax.sampling.prompt_text import Style, count_chunks
from safetydpo_jax.sampling.settings import RenderSettings


class Prompts(NamedTuple):
  """The prompts of a CSV, and how they are read.

  Attributes:
    file: the CSV, or what else to call it in messages.
    rows: each once.
    texts: of each row, its prompt and its negative prompt.
    style: how they are read, see `prompt_text.py`.
    negative_prompt: of rows without one.
    changes: a line on what `fix_text` changed, "" without it.
  """

  file: Path | str
  rows: Sequence[Row]
  texts: Sequence[tuple[str, str]]
  style: Style
  negative_prompt: str | None
  changes: str


def check_guidance(
  options: RenderSettings, rows: Sequence[Row], pipeline: Pipeline
) -> None:
  """Raises `InputError` for what a UNet distilled with guidance cannot do."""
  if not pipeline.unet.config.get("time_cond_proj_dim"):
    return
  what = {
    "--guidance_rescale": options.guidance_rescale,
    "--negative_prompt": options.negative_prompt,
    "the CSV's negative_prompt": next(
      filter(None, (r.negative_prompt for r in rows)), 0
    ),
  }
  for name, value in what.items():
    if value:
      raise InputError(
        f"{name} is {value!r}, but {pipeline.name} was distilled with guidance and "
        "never sees a negative prompt; leave it out"
      )


def gather(file: Path | str, rows: Sequence[Row], settings: RenderSettings) -> Prompts:
  """The prompts of rows, of which some may be listed twice, repaired if asked for.

  Raises:
    InputError: the style does not read a prompt as the web UI would, or ftfy is needed
      and not installed.
  """
  negative_prompt, style, changes = settings.negative_prompt, settings.prompt_style, ""
  if settings.fix_text:
    rows, changes = cleaning.fix_rows(rows)
    negative_prompt = negative_prompt and cleaning.fix(negative_prompt)
  wanted = [wanted_of(row, settings.guidance, negative_prompt) for row in rows]
  texts = {row: (each.prompt, each.negative) for row, each in zip(rows, wanted)}
  for row, (prompt, negative) in texts.items() if style == "a1111" else ():
    try:
      emphasis.check(prompt)
      emphasis.check(negative, negative=True)
    except InputError as error:
      raise InputError(f"{file} row {row.number + 1}: {error}") from None
  return Prompts(
    file, list(texts), list(texts.values()), style, negative_prompt, changes
  )


def chunks_of(pipeline: Pipeline, prompts: Prompts) -> dict[int, int]:
  """{number of a row: how many chunks its image is rendered from}."""
  ours, negatives = zip(*prompts.texts)
  counts = count_chunks(pipeline, ours, negatives, prompts.style)
  return {row.number: count for row, count in zip(prompts.rows, counts)}


def find_cut(pipeline: Pipeline, prompts: Prompts) -> dict[str, int] | None:
  """For the manifest: which rows' prompts are longer than the text encoder reads.

  Returns:
    None if none is, else how many `rows` have such a prompt or negative prompt, the
    `limit` in tokens, start and end included, the `longest` and its `row`, from 1.
  """
  if prompts.style != "plain":
    return None
  limits = np.array(pipeline.token_limits)[:, None]
  counts = np.stack([pipeline.count_tokens(x) for x in zip(*prompts.texts)])
  cut = (counts > limits).any(axis=(0, 1))
  if not cut.any():
    return None
  longest = np.where(cut, counts.max(axis=(0, 1)), 0)
  return {
    "rows": int(cut.sum()),
    "limit": int(limits.min()),
    "longest": int(longest.max()),
    "row": prompts.rows[int(longest.argmax())].number + 1,
  }


def notes(prompts: Prompts, cut: dict[str, int] | None) -> list[str]:
  """A line each on prompts that are cut and on weights that are read as text."""
  lines, count = [], f"of {len(prompts.rows):,} prompts"
  if cut:
    lines.append(
      f"{prompts.file}: {cut['rows']:,} {count} are cut at {cut['limit']} tokens; the "
      f"longest, row {cut['row']}, has {cut['longest']:,}; --prompt_style long reads "
      "them whole"
    )
  weighted = [
    row.number + 1
    for row, both in zip(prompts.rows, prompts.texts)
    if any(map(emphasis.WEIGHT.search, both))
  ]
  if weighted and prompts.style != "a1111":
    lines.append(
      f"{prompts.file}: {len(weighted):,} {count} have weights, (word:1.3), the first "
      f"in row {weighted[0]}; they are read as text; --prompt_style a1111 applies them"
    )
  return lines
