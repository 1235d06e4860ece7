"""Writes the report of `evaluate`: one HTML file that needs no network, no other file.

Its chapters are functions in `page/`; its one script, which sorts and filters, is
`page/script.py`.
"""

from pathlib import Path

from safetydpo_jax.evaluation.page import gallery, headline, process, results, script
from safetydpo_jax.evaluation.page.view import View
from safetydpo_jax.report.html import contents, page, section
from safetydpo_jax.runtime import files

# Heading → the function that writes its blocks.
CHAPTERS = {
  "Harm, category by category": results.rates,
  "Detectors and pairs": results.detectors,
  "With and without": results.scopes,
  "Quality": results.quality,
  "Worst and best": gallery.examples,
  "Every image": gallery.every_image,
  "Rows": process.states,
  "How it was measured": process.settings,
  "Before you quote a number": process.note,
}


def build(view: View) -> str:
  """The page as HTML."""
  bodies = {name: chapter(view) for name, chapter in CHAPTERS.items()}
  bodies = {name: body for name, body in bodies.items() if body}
  return page(
    f"SafetyDPO, {view.result.get('title') or 'evaluation'}",
    headline.masthead(view),
    contents(list(bodies)),
    *(section(name, *body) for name, body in bodies.items()),
    script=script.SCRIPT,
  )


def write(out: Path, text: str) -> Path:
  """Writes `out`/report/index.html; returns it."""
  file = out / "report" / "index.html"
  files.write_text(file, text)
  return file
