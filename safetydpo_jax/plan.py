"""Whether a run fits a slice, and how fast it can be: `python -m safetydpo_jax.plan …`.

Prints memory, operations, traffic and a roofline estimate for each chip; no weights are
read. The work: `planning/plan_step.py`.
"""

from safetydpo_jax.errors import run_command
from safetydpo_jax.planning.plan_step import PlanOptions, plan_step
from safetydpo_jax.runtime import command_line
from safetydpo_jax.training.config import RunConfig
from safetydpo_jax.training.read_config import read_config

EXAMPLE = """example:
  python -m safetydpo_jax.plan --config hate:sd15 --topology v5e:4x4

topologies: v5e:4x4, v6e:8x8, v4:2x2x2, v5p:2x2x1 and the like (Cloud TPU's shapes) are
compiled for, 10 to 50 minutes each at full size; gpu:h100x8, gpu:h200x8, gpu:a100x8 are
arithmetic.
"""


def parse(arguments: list[str] | None = None) -> tuple[RunConfig, PlanOptions]:
  """The config with its overrides, and the options."""
  options, overrides = command_line.parse_alone_with_overrides(
    PlanOptions, arguments, command="plan", example=EXAMPLE
  )
  return read_config(options.config, overrides), options


def main(arguments: list[str] | None = None) -> None:
  """Reads the config, compiles or counts, prints."""
  plan_step(*parse(arguments))


if __name__ == "__main__":
  run_command(main)
