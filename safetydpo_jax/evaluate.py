"""Turns images into figures: `python -m safetydpo_jax.evaluate --images DIR …`.

Writes figures.json, images.csv and report/index.html below --out
(`evaluation/evaluate_folder.py`). With --suite it renders and measures several prompt
sets (`evaluation/suite.py`):

  python -m safetydpo_jax.evaluate --suite safety --model sd15 --lora merged \\
    --sets sets --q16 prompts.p --out report
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.evaluate_folder import EvaluateOptions, evaluate_folder
from safetydpo_jax.evaluation.suite import Name as SuiteName
from safetydpo_jax.evaluation.suite import SuiteOptions, run_suite
from safetydpo_jax.evaluation.summary import print_suite, print_summary
from safetydpo_jax.runtime import command_line, hosts
from safetydpo_jax.runtime.command_line import Repeated
from safetydpo_jax.sampling.settings import RenderSettings, settings_of

EXAMPLE = """example:
  python -m safetydpo_jax.evaluate --images images --reference images/base \\
    --prompts prompts.csv --metrics ip --detector toy --out report
"""


@dataclasses.dataclass(frozen=True)
class Command:
  """Measures safety and quality of images rendered from a prompts CSV.

  With --suite it renders them itself: --prompt_style to --vae are as in `generate`.
  """

  out: Path
  """folder for figures.json, images.csv and report/"""
  images: Path | None = None
  """what `generate` rendered"""
  prompts: Path | None = None
  """the CSV it was rendered from"""
  reference: Path | None = None
  """the same rows rendered by the reference model, usually the base model"""
  detectors: Annotated[DetectorOptions, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=DetectorOptions
  )
  train: Path | None = None
  """CoProV2's CSV of training pairs, to mark leaked prompts"""
  suite: SuiteName | None = None
  """render and measure the prompt sets in --sets"""
  sets: Path | None = None
  """for --suite: folder of prompt sets, i2p.csv and others"""
  model: str | None = None
  """for --suite: the model to render with"""
  lora: Repeated[tuple[str, ...]] = ()
  """for --suite: L[:SCALE], may be repeated; the model without LoRAs is the
  reference"""
  any_base: bool = False
  """for --suite: take LoRAs of another base model"""
  rendering: Annotated[RenderSettings, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=RenderSettings
  )
  render_batch_size: int = 4
  """for --suite: images per device"""
  limit: int = 0
  """for --suite: rows of each set, 0 for all"""
  title: str = ""
  """title of the report"""
  seed: int = 0
  """seed of the bootstrap"""

  @property
  def values(self) -> dict[str, Any]:
    """Every option by its name, also those of rendering."""
    given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return given | settings_of(given.pop("rendering"))

  def job(self) -> EvaluateOptions | SuiteOptions:
    """The options of what is asked for.

    Raises:
      InputError: one of them is missing, or belongs to the other job.
    """
    values, default = self.values, Command(self.out).values
    needed = ("sets", "model") if self.suite else ("images", "prompts")
    if missing := [name for name in needed if values[name] is None]:
      raise InputError(
        f"--{missing[0]} is missing; give --images and --prompts, or --suite, --sets "
        "and --model"
      )
    kind = SuiteOptions if self.suite else EvaluateOptions
    taken = {field.name for field in dataclasses.fields(kind)}
    for name, value in values.items():
      if name not in {*taken, "suite"} and value != default[name]:
        raise InputError(
          f"--{name} does not apply with --suite, which renders its own images; leave "
          "it out"
          if self.suite
          else f"--{name} applies to --suite, which renders images; leave it out to "
          "measure existing ones"
        )
    return kind(**{name: values[name] for name in taken})


def main(arguments: list[str] | None = None) -> None:
  """Reads the command line, measures, prints."""
  command, processes = command_line.parse(
    Command, arguments, command="evaluate", example=EXAMPLE
  )
  options = command.job()
  hosts.initialize(processes)
  if isinstance(options, SuiteOptions):
    print_suite(run_suite(options))
  else:
    print_summary(evaluate_folder(options))
  if jax.process_index() == 0:
    print(f"{options.out}/report/index.html")


if __name__ == "__main__":
  run_command(main)
