"""White-box attacks on aligned models: `python -m safetydpo_jax.toyworld.attack`.

What is attacked, how it is judged and what is written: `experiments/attack_models.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.experiments.attack_models import (
  AttackOptions,
  attack_models,
)

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.attack --model toy --lora demo/merged \\
    --prompts demo/prompts/test.csv --out attack
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options = command_line.parse_alone(
    AttackOptions, arguments, command="toyworld.attack", example=EXAMPLE
  )
  attack_models(options)


if __name__ == "__main__":
  run_command(main)
