"""Prompts of the toy world as CSV files: `python -m safetydpo_jax.toyworld.prompts`.

What the files hold: `experiments/prompt_files.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.experiments.prompt_files import PromptOptions, write_prompts

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.prompts --kind pairs --per_category 84 \\
    --out pairs/prompts.csv
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options = command_line.parse_alone(
    PromptOptions, arguments, command="toyworld.prompts", example=EXAMPLE
  )
  write_prompts(options)


if __name__ == "__main__":
  run_command(main)
