"""Merging in the toy world, measured: `python -m safetydpo_jax.toyworld.study`.

What is compared and what is written: `experiments/compare_merges.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.experiments.compare_merges import StudyOptions, run_study

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.study --out study --seeds 0,1,2
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options, overrides = command_line.parse_alone_with_overrides(
    StudyOptions, arguments, command="toyworld.study", example=EXAMPLE
  )
  run_study(options, overrides)


if __name__ == "__main__":
  run_command(main)
