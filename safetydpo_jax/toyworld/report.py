"""The demo's report: `python -m safetydpo_jax.toyworld.report --folder demo`.

Reads demo/figures.json, which the demo writes, and the pictures it names, and writes
demo/report/index.html: one file that needs no network and no other file. What
figures.json holds: `experiments/demo_figures.py`.
"""

import dataclasses
from pathlib import Path

from safetydpo_jax.errors import run_command
from safetydpo_jax.report import page
from safetydpo_jax.runtime import command_line, files, manifest
from safetydpo_jax.toyworld.experiments import demo_figures, report_process
from safetydpo_jax.toyworld.experiments import report_view as view

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.report --folder demo
"""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Writes the demo's report from its figures and pictures."""

  folder: Path
  """the demo's folder"""


def build(folder: Path, figures: dict) -> str:
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


def write_report(folder: Path, figures: dict) -> Path:
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


def main(arguments: list[str] | None = None) -> None:
  """Reads the figures, writes the page."""
  options, _ = command_line.parse(
    ReportOptions, arguments, command="toyworld.report", example=EXAMPLE
  )
  figures = manifest.read_json(options.folder / "figures.json", "demo")
  print(write_report(options.folder, figures))


if __name__ == "__main__":
  run_command(main)
