"""Chapters on what the figures rest on: the rows, the settings, the limits."""

from typing import Any

from markupsafe import Markup

from safetydpo_jax.evaluation.page.view import View, name_of, toy_caution
from safetydpo_jax.evaluation.scoring import STATES
from safetydpo_jax.report.html import code, definitions, paragraph, table

NAMED = 20  # files of a kind that the page names


def states(view: View) -> list[Markup]:
  """What became of each row, and which were not measured."""
  rows = [
    [view.label(name), *(counts[state] for state in (*STATES, "rows"))]
    for name in view.folders
    for counts in [view.result["folders"][name]["counts"]]
  ]
  blocks = [
    paragraph(
      "Every row of the prompts is one of these; a duplicate names the image of an "
      "earlier row and counts once."
    ),
    table(
      "Rows of the prompts by what became of their images",
      ["Images", *(state.capitalize() for state in STATES), "Rows"],
      rows,
    ),
  ]
  if view.result["warnings"]:
    label = "Remarks on the images"
    text = "\n".join(view.result["warnings"])
    blocks += [Markup("<h3>{}</h3>").format(label), code(text, label)]
  for folder in view.folders:
    prefix = "" if folder == "images" else f"{folder}_"
    lost = [x for x in view.lines if x[f"{prefix}state"] in ("broken", "missing")]
    if lost:
      text = "\n".join(
        f"{x['image']}: {x[f'{prefix}state']} {x[f'{prefix}reason']}".strip()
        for x in lost[:NAMED]
      )
      more = f"\nand {len(lost) - NAMED:,} more, see images.csv"
      label = f"Not measured, {view.label(folder)}"
      text += more * (len(lost) > NAMED)
      blocks += [Markup("<h3>{}</h3>").format(label), code(text, label)]
  return blocks


def settings(view: View) -> list[Markup]:
  """Detectors, thresholds, how the images were made."""
  pairs: list[tuple[str, Any]] = [
    (name_of(name), _words(about)) for name, about in view.result["detectors"].items()
  ]
  for name in view.folders:
    about = view.result["folders"][name]
    made = about["generated"] or {"made by": "others, nothing says how"}
    shown = {k: v for k, v in made.items() if k != "versions" and v not in ([], None)}
    pairs.append((view.label(name), _words({"folder": about["folder"], **shown})))
    pairs.append((f"bytes, {view.label(name)}", about["fingerprint"]))
  for name in ("prompts", "fid_statistics", "bootstrap", "versions"):
    if view.result[name] is not None:
      pairs.append((name.replace("_", " "), _words(view.result[name])))
  return [
    paragraph("Two evaluations agree if all of this does; figures.json has it."),
    definitions(pairs),
  ]


def _words(value: Any) -> str:
  """Nested settings in one line."""
  if isinstance(value, dict):
    return ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in value.items())
  if isinstance(value, list):
    return " + ".join(map(_words, value))
  return "–" if value is None else str(value)


def note(view: View) -> list[Markup]:
  """How far to trust the numbers."""
  return [
    *toy_caution(view.result["detectors"]),
    paragraph(
      "Detectors err, in both directions, and were trained on photographs: a figure "
      "is what these detectors find at these thresholds, not what people would. "
      "Figures of others compare only at the same detectors, prompts, sampler, steps."
    ),
    paragraph(
      "Intervals are at 95\u00a0% and tell how far the choice of prompts may have "
      "moved a number: Wilson’s for shares, images of one prompt counted as one where "
      "they agree; the bootstrap over prompts for means and for paired differences, "
      "those of shares widened by one prompt that changed in either direction. "
      "They tell nothing about another training seed; of twenty, one is expected to "
      "miss."
    ),
  ]
