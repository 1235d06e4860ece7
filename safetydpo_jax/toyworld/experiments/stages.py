"""The demo as a table of commands, and how one of its stages runs.

Every command is a call of a room's function in this process, shown as the line that a
user would type for it.
"""

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, TypeVar

from safetydpo_jax.data import categories
from safetydpo_jax.data.cache.encode_dataset import EncodeOptions, encode_dataset
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.export_lora import ExportOptions, export_lora
from safetydpo_jax.merging.merge_experts import merge_experts
from safetydpo_jax.merging.options import MergeOptions, Method
from safetydpo_jax.runtime import command_line
from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv
from safetydpo_jax.toyworld.experiments.measuring import MeasureOptions, measure
from safetydpo_jax.toyworld.experiments.prompt_files import PromptOptions, write_prompts
from safetydpo_jax.training.read_config import read_config
from safetydpo_jax.training.run import train

Options = TypeVar("Options")
STEPS, GUIDANCE = 12, 4.0  # of the sampler; with 12 steps every base picture is right
BATCH = 48  # pictures per device
CONTENDERS = ("base", "experts", "merged")


@dataclasses.dataclass(frozen=True)
class DemoOptions:
  """Runs the whole method in the toy world and writes a report.

  A value of the experts' training is overridden by --config.NAME=VALUE.
  """

  out: Path
  """the demo's folder; a stopped demo resumes from what it holds"""
  model: str = "toy"
  """the base model"""
  seed: int = 0
  """decides prompts, noises, the LoRA's first factors and the order of training"""
  pairs: int = 168
  """training pairs of each category"""
  test: int = 48
  """unsafe test prompts of each category"""
  categories: str | None = None
  """NAME,NAME,… (default: all seven)"""
  merge: Method = "co_merge_product"
  """merging method"""
  no_open: bool = False
  """do not open the report in a browser"""

  def __post_init__(self):
    if self.test < 2:
      raise InputError(f"--test is {self.test}; expected 2 or more, for two phrasings")
    _ = self.names  # refuses unknown ones

  @property
  def names(self) -> tuple[str, ...]:
    """Our names of the categories, one by one."""
    if self.categories is None:
      return categories.CATEGORIES
    return tuple(categories.normalise(name) for name in self.categories.split(","))


class Call(NamedTuple):
  """One command: the line that a user would type, and what it does, in this process."""

  line: str
  run: Callable[[], object]


class Stage(NamedTuple):
  """Commands that belong together."""

  name: str
  what: str
  calls: Sequence[Call]


class Timing(TypedDict):
  """What the report says of a stage."""

  step: str
  what: str
  seconds: float
  commands: list[str]


def read_overrides(words: Sequence[str]) -> dict[str, str]:
  """`--config.NAME=VALUE` words → {NAME: VALUE}.

  Raises:
    InputError: a word has no `=`.
  """
  for word in words:
    if "=" not in word:
      raise InputError(f"{word}: expected {word}=VALUE")
  return dict(word.removeprefix("--config.").split("=", 1) for word in words)


def command(name: str, function: Callable[[Options], object], options: Options) -> Call:
  """The command `name`, whose work is `function`, with its options."""
  return Call(command_line.written(name, options), partial(function, options))


def training(category: str, folder: Path, values: Mapping[str, object]) -> Call:
  """`train` with the toy preset of a category, or of "all_single".

  Args:
    category: the preset's name.
    folder: the run's.
    values: what replaces the preset's values, by dotted name.

  Raises:
    InputError: a name or a value is wrong.
  """
  preset = f"{category}:toy"
  words = [f"--config.{name}={value}" for name, value in values.items()]
  line = ["python", "-m", "safetydpo_jax.train", "--config", preset]
  line += ["--workdir", str(folder), *words]
  return Call(shlex.join(line), partial(train, read_config(preset, words), folder))


def drawing(model: str, prompts: Path, folder: Path, *loras: Path) -> Call:
  """`generate` with the experiments' sampler."""
  options = RenderOptions(
    model=model,
    prompts=prompts,
    out=folder,
    lora=tuple(map(str, loras)),
    steps=STEPS,
    guidance=GUIDANCE,
    batch_size=BATCH,
  )
  return command("generate", render_csv, options)


def stages(options: DemoOptions, overrides: Mapping[str, str]) -> list[Stage]:
  """The demo's stages, in the order they run.

  Args:
    options: the demo's.
    overrides: values of the experts' config, by dotted name.

  Raises:
    InputError: an override is wrong.
  """
  out, model, seed = options.out, options.model, options.seed
  cache, merged, every = out / "cache", out / "merged", ",".join(options.names)
  pairs, test = out / "pairs/prompts.csv", out / "prompts/test.csv"
  tests = {name: out / f"prompts/{name}.csv" for name in options.names}
  runs = {name: out / "runs" / name for name in options.names}
  images = {name: out / "images/experts" / name for name in options.names}
  config = {"model": model, "cache": cache, "seed": seed, "lora.seed": seed}

  def prompts(kind: Literal["pairs", "test"], file: Path, count: int, names: str):
    chosen = PromptOptions(kind, file, count, names, seed)
    return command("toyworld.prompts", write_prompts, chosen)

  def measured(file: Path, folder: Path, name: str) -> Call:
    chosen = MeasureOptions(folder, file, out / f"figures/{name}.json")
    return command("toyworld.measure", measure, chosen)

  encode = EncodeOptions(pairs=str(pairs.parent), model=model, out=str(cache))
  merge = MergeOptions(
    experts=",".join(map(str, runs.values())),
    method=options.merge,
    out=merged,
    calibration=str(cache) if options.merge.startswith("co_merge") else None,
  )
  export = ExportOptions(lora=str(merged), model=model, out=out / "exported")
  return [
    Stage(
      "prompts",
      "unsafe prompts and their safe twins, for pairs and for the test",
      [
        prompts("pairs", pairs, options.pairs, every),
        prompts("test", test, options.test, every),
        *(prompts("test", tests[name], options.test, name) for name in tests),
      ],
    ),
    Stage(
      "pairs",
      "both prompts of each pair, rendered from one noise by the model to be aligned",
      [drawing(model, pairs, pairs.parent)],
    ),
    Stage(
      "encode",
      "the VAE and the tokenizer, once",
      [command("encode", encode_dataset, encode)],
    ),
    Stage(
      "train",
      "one expert for each category",
      [training(name, run, {**config, **overrides}) for name, run in runs.items()],
    ),
    Stage(
      "merge", "the experts into one LoRA", [command("merge", merge_experts, merge)]
    ),
    Stage(
      "export",
      "a LoRA file that diffusers loads",
      [command("export", export_lora, export)],
    ),
    Stage(
      "images",
      "test prompts by the base model, by each expert and by the merged LoRA",
      [
        drawing(model, test, out / "images/base"),
        *(drawing(model, tests[name], images[name], runs[name]) for name in runs),
        drawing(model, test, out / "images/merged", merged),
      ],
    ),
    Stage(
      "measure",
      "symbols found and scenes read",
      [
        measured(test, out / "images/base", "base"),
        *(measured(tests[name], images[name], f"expert_{name}") for name in runs),
        measured(test, out / "images/merged", "merged"),
      ],
    ),
  ]


def run_call(call: Call) -> None:
  """Shows the command's line, then does what it says."""
  print(f"$ {call.line}", flush=True)
  call.run()


def run_stage(stage: Stage, number: str) -> Timing:
  """Runs a stage's commands; returns what `timings` says of it."""
  print(f"\n{number}  {stage.name}: {stage.what}", flush=True)
  start = time.monotonic()
  for call in stage.calls:
    run_call(call)
  seconds = time.monotonic() - start
  print(f"{number}  {stage.name}: {seconds:.0f} s", flush=True)
  lines = [call.line for call in stage.calls]
  return {
    "step": stage.name,
    "what": stage.what,
    "seconds": seconds,
    "commands": lines,
  }
