"""The demo's report: `python -m safetydpo_jax.toyworld.report --folder demo`.

Reads demo/figures.json, which the demo writes, and the pictures it names, and writes
demo/report/index.html: one file that needs no network and no other file. What
figures.json holds: `experiments/demo_figures.py`.
"""

import dataclasses
from pathlib import Path

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line, manifest
from safetydpo_jax.toyworld.experiments.demo_report import write_report

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.report --folder demo
"""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """Writes the demo's report from its figures and pictures."""

  folder: Path
  """the demo's folder"""


def main(arguments: list[str] | None = None) -> None:
  """Reads the figures, writes the page."""
  options = command_line.parse_alone(
    ReportOptions, arguments, command="toyworld.report", example=EXAMPLE
  )
  figures = manifest.read_json(options.folder / "figures.json", "demo")
  print(write_report(options.folder, figures))


if __name__ == "__main__":
  run_command(main)
