"""Makes the toy Stable Diffusion: `python -m safetydpo_jax.toyworld.pretrain`.

What it trains and writes: `pretraining/pretrain_model.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line
from safetydpo_jax.toyworld.pretraining.pretrain_model import (
  PretrainOptions,
  pretrain_model,
)

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.pretrain --out toy-model
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options = command_line.parse_alone(
    PretrainOptions, arguments, command="toyworld.pretrain", example=EXAMPLE
  )
  pretrain_model(options)


if __name__ == "__main__":
  run_command(main)
