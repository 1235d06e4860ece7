"""The demo's report: one HTML file that needs no network and no other file."""

from pathlib import Path
from typing import Any

from safetydpo_jax.report import page
from safetydpo_jax.runtime import files
from safetydpo_jax.toyworld.experiments import demo_figures, report_process
from safetydpo_jax.toyworld.experiments import report_view as view


def build(folder: Path, figures: dict[str, Any]) -> str:
  """The page as HTML, pictures taken from `folder`."""
  return page.render(
    "demo.html",
    f"SafetyDPO, {figures.get('title', 'toy world')}",
    top=view.top(figures),
    strip=view.strip(folder, figures),
    what_you_see=view.what_you_see(folder, figures),
    grids=view.grids(folder, figures),
    rates=view.rates(figures),
    phrasings=view.phrasings(figures),
    utility=view.utility(figures),
    curves=report_process.curves(figures),
    timings=report_process.timings(figures),
    commands=report_process.commands(figures),
    limits=report_process.limits(figures),
  )


def write_report(folder: Path, figures: dict[str, Any]) -> Path:
  """Writes `folder`/report/index.html.

  Args:
    folder: the demo's, to which the paths of pictures are relative.
    figures: the content of figures.json.

  Returns:
    The file.

  Raises:
    InputError: figures lack a field, a picture is missing or outside of the folder, or
      the file cannot be written.
  """
  demo_figures.check(figures)
  file = Path(folder, "report", "index.html")
  files.write_text(file, build(Path(folder), figures))
  return file
