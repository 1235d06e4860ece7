"""Renders a CSV of prompts: `python -m safetydpo_jax.generate`.

Images that exist are kept, so an interrupted run continues with the same command. What
determines the images is in DIR/plan.json until all are there and then in
DIR/generate.json; a command that would render other images there is refused.
DIR/sheet.jpg shows some of them, blurred. The work: `sampling/render_csv.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line, hosts
from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv

EXAMPLE = """example:
  python -m safetydpo_jax.generate --model sd15 --lora runs/hate \\
    --prompts prompts.csv --out images --steps 50 --guidance 7.5
"""


def main(arguments: list[str] | None = None) -> None:
  """Reads the command line and renders."""
  options, job = command_line.parse(
    RenderOptions, arguments, command="generate", example=EXAMPLE
  )
  hosts.initialize(job)
  render_csv(options)


if __name__ == "__main__":
  run_command(main)
