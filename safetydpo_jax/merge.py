"""Merges experts into one LoRA: `python -m safetydpo_jax.merge --experts A,B …`.

What it reads and writes: `merging/merge_experts.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.merging.merge_experts import MergeOptions, merge_experts
from safetydpo_jax.runtime import command_line, hosts

EXAMPLE = """example:
  python -m safetydpo_jax.merge --experts runs/hate,runs/violence --method co_merge \\
    --calibration cache --out merged
"""


def main(arguments: list[str] | None = None) -> None:
  """The command."""
  options, job = command_line.parse(
    MergeOptions, arguments, command="merge", example=EXAMPLE
  )
  hosts.initialize(job)
  merge_experts(options)


if __name__ == "__main__":
  run_command(main)
