"""Concepts → pairs of prompts, by a language model: `python -m safetydpo_jax.prompts`.

What it reads, asks and writes: `data/writing/write_prompts.py`.
"""

from safetydpo_jax.data.writing.write_prompts import PromptOptions, write_prompts
from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line

EXAMPLE = """example:
  python -m safetydpo_jax.prompts --concepts concepts.csv \\
    --endpoint http://localhost:8000/v1 --model NAME --out pairs/prompts.csv
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options = command_line.parse_alone(
    PromptOptions, arguments, command="prompts", example=EXAMPLE
  )
  write_prompts(options)


if __name__ == "__main__":
  run_command(main)
