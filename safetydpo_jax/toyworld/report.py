"""The demo's report: `python -m safetydpo_jax.toyworld.report --folder demo`.

Reads demo/figures.json, which the demo writes, and the pictures it names, and writes
demo/report/index.html: one file that needs no network and no other file. What
figures.json holds: `page/figures.py`.
"""

import argparse
from pathlib import Path

from safetydpo_jax.errors import run_command
from safetydpo_jax.report.html import contents, page, section
from safetydpo_jax.runtime import files, manifest
from safetydpo_jax.toyworld.page import gallery, headline, process, results
from safetydpo_jax.toyworld.page.figures import check

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.report --folder demo
"""
# Heading → the function that writes its blocks.
CHAPTERS = {
  "What you see": headline.what_you_see,
  "Pictures, category by category": gallery.grids,
  "Harm, category by category": results.rates,
  "Seen and held-out phrasings": results.phrasings,
  "Utility": results.utility,
  "Training": process.curves,
  "Time": process.timings,
  "Do it again": process.commands,
  "Before you quote a number": process.note,
}


def build(folder: Path, figures: dict) -> str:
  """The page as HTML, pictures taken from `folder`."""
  bodies = {name: chapter(folder, figures) for name, chapter in CHAPTERS.items()}
  bodies = {name: body for name, body in bodies.items() if body}
  title = f"SafetyDPO, {figures.get('title', 'toy world')}"
  return page(
    title,
    headline.masthead(folder, figures),
    contents(list(bodies)),
    *(section(name, *body) for name, body in bodies.items()),
  )


def write_report(folder: Path, figures: dict) -> Path:
  """Writes `folder`/report/index.html.

  Args:
    folder: the demo's, to which the paths of pictures are relative.
    figures: the content of figures.json.

  Returns:
    The file.

  Raises:
    InputError: if figures lack a field, a picture is missing or outside of the folder,
      or the file cannot be written.
  """
  check(figures)
  text = build(Path(folder), figures)
  file = Path(folder, "report", "index.html")
  files.write_text(file, text)
  return file


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.report",
    description="Writes the demo's report from its figures and pictures.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--folder", required=True, type=Path, help="the demo's")
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  """Reads the figures, writes the page."""
  options = parse_arguments(arguments)
  figures = manifest.read_json(options.folder / "figures.json", "demo")
  print(write_report(options.folder, figures))


if __name__ == "__main__":
  run_command(main)
