"""The whole method in the toy world: `python -m safetydpo_jax.toyworld.demo`.

Runs the project's commands one after the other, as printed, and ends with
OUT/report/index.html: one file, nothing else is needed to read it. The stages and what
they leave in OUT: `experiments/demonstrate.py`.
"""

import os
import sys
import webbrowser

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.experiments.demo_report import write_report
from safetydpo_jax.toyworld.experiments.demonstrate import describe, run_demo
from safetydpo_jax.toyworld.experiments.stages import DemoOptions

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.demo --out demo
"""


def main(arguments: list[str] | None = None) -> None:
  """Runs every stage, writes the report, prints the result and the report's address."""
  options, overrides = command_line.parse_alone_with_overrides(
    DemoOptions, arguments, command="toyworld.demo", example=EXAMPLE
  )
  figures = run_demo(options, overrides)
  page = write_report(options.out, figures).resolve()
  print(f"{describe(figures)}\nreport: {page.as_uri()}")
  screen = sys.platform == "darwin" or os.environ.get("DISPLAY")
  if screen and sys.stdout.isatty() and not options.no_open:
    webbrowser.open(page.as_uri())


if __name__ == "__main__":
  run_command(main)
