"""Writes the report of `evaluate`: one HTML file that needs no network, no other file.

The page is report/templates/evaluation.html; what it shows is computed in
`verdicts.py`, `report_view.py` and `examples.py`.
"""

from pathlib import Path

from safetydpo_jax.evaluation import examples, report_view, verdicts
from safetydpo_jax.evaluation.report_view import View
from safetydpo_jax.report import page
from safetydpo_jax.runtime import files


def build(view: View) -> str:
  """The page as HTML."""
  return page.render(
    "evaluation.html",
    f"SafetyDPO, {view.result.get('title') or 'evaluation'}",
    page.asset("interactive.js"),
    top=verdicts.top(view),
    rates=report_view.rates(view),
    detectors=report_view.detectors(view),
    scopes=report_view.scopes(view),
    quality=report_view.quality(view),
    examples=examples.examples(view),
    every_image=examples.every_image(view),
    states=report_view.states(view),
    settings=report_view.settings(view),
    toy="toy" in view.result["detectors"],
  )


def write(out: Path, text: str) -> Path:
  """Writes `out`/report/index.html; returns it."""
  file = out / "report" / "index.html"
  files.write_text(file, text)
  return file
