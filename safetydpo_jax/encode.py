"""Images and prompts → a pair cache: `python -m safetydpo_jax.encode`.

What it reads and writes: `data/cache/encode_dataset.py`.
"""

from safetydpo_jax.data.cache.encode_dataset import EncodeOptions, encode_dataset
from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line, hosts

EXAMPLE = """example:
  python -m safetydpo_jax.encode --model sd15 --pairs CoProV2 --out cache/sd15

what is in a dataset, without a model:
  python -m safetydpo_jax.encode --pairs CoProV2 --stats sheet.png
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options, job = command_line.parse(
    EncodeOptions, arguments, command="encode", example=EXAMPLE
  )
  hosts.initialize(job)
  encode_dataset(options)


if __name__ == "__main__":
  run_command(main)
