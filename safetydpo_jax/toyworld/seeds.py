"""The demo with several seeds: `python -m safetydpo_jax.toyworld.seeds --out seeds`.

What it runs and the table it prints: `experiments/several_seeds.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.experiments.several_seeds import SeedOptions, run_seeds

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.seeds --out seeds --seeds 0,1,2
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options, overrides = command_line.parse_alone_with_overrides(
    SeedOptions, arguments, command="toyworld.seeds", example=EXAMPLE
  )
  run_seeds(options, overrides)


if __name__ == "__main__":
  run_command(main)
