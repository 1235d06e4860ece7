"""Trains one safety expert: `python -m safetydpo_jax.train --config … --workdir RUN`.

The work and what it leaves in RUN: `training/run.py`.
"""

import dataclasses
from pathlib import Path

from safetydpo_jax.errors import run_command
from safetydpo_jax.runtime import command_line, hosts
from safetydpo_jax.runtime.hosts import Hosts
from safetydpo_jax.training import run
from safetydpo_jax.training.config import RunConfig
from safetydpo_jax.training.read_config import read_config

EXAMPLE = """example:
  python -m safetydpo_jax.train --config hate:sd15 --workdir runs/hate \\
    --config.cache=cache/hate --config.steps=2000
"""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  """Trains one LoRA safety expert with DPO; --config.NAME=VALUE overrides a value."""

  config: str
  """a preset or a config file, and a model family: hate:sd15, configs/hate.py:sdxl"""
  workdir: Path
  """the run's folder; a run that it holds is resumed"""


def parse(arguments: list[str] | None = None) -> tuple[RunConfig, Path, Hosts]:
  """The config with its overrides, the run's folder, and the job's processes."""
  options, job, overrides = command_line.parse_with_overrides(
    TrainOptions, arguments, command="train", example=EXAMPLE
  )
  return read_config(options.config, overrides), options.workdir, job


def main(arguments: list[str] | None = None) -> None:
  """Reads the config, then trains."""
  config, workdir, job = parse(arguments)
  hosts.initialize(job, preemption=True)
  run.train(config, workdir)


if __name__ == "__main__":
  run_command(main)
