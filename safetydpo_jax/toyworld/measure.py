"""What pictures of toy prompts show: `python -m safetydpo_jax.toyworld.measure`.

What is counted, and how: `experiments/measuring.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.experiments.measuring import MeasureOptions, measure

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.measure --images images/base \\
    --prompts prompts/test.csv
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options = command_line.parse_alone(
    MeasureOptions, arguments, command="toyworld.measure", example=EXAMPLE
  )
  measure(options)


if __name__ == "__main__":
  run_command(main)
