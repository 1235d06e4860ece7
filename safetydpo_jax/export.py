"""Exports a LoRA for PyTorch: `python -m safetydpo_jax.export --lora L --model M …`.

What it writes: `formats/export_lora.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.formats.export_lora import ExportOptions, export_lora
from safetydpo_jax.runtime import command_line

EXAMPLE = """example:
  python -m safetydpo_jax.export --lora runs/hate --model sd15 --format diffusers \\
    --out exported/hate
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options = command_line.parse_alone(
    ExportOptions, arguments, command="export", example=EXAMPLE
  )
  export_lora(options)


if __name__ == "__main__":
  run_command(main)
