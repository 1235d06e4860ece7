"""The demo as a table of commands (`demo.py`), and how one stage of it runs."""

import argparse
import importlib
import os
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS, GUIDANCE = "12", "4"  # of the sampler; with 12 steps every base picture is right
CONTENDERS = ("base", "experts", "merged")
CONFIGS = Path(__file__).parents[3] / "configs"


class Stage(NamedTuple):
  """Commands that belong together: (module below safetydpo_jax, arguments) each."""

  name: str
  what: str
  commands: list[tuple[str, list[str]]]


def stages(options: argparse.Namespace) -> list[Stage]:
  """The demo as commands, in the order they run."""
  out, seed = options.out, str(options.seed)
  pairs, test = out / "pairs/prompts.csv", out / "prompts/test.csv"
  tests = {name: out / f"prompts/{name}.csv" for name in options.categories}
  toy = ["--model", options.model]
  only = ["--category", ",".join(options.categories)]

  def prompts(kind, count, file, *category):
    count = ["--per_category", str(count)]
    arguments = ["--kind", kind, *count, "--seed", seed, *category, "--out", file]
    return "toyworld.prompts", arguments

  def generate(file, folder, *lora):
    arguments = [*toy, *lora, "--prompts", file, "--out", folder]
    sampler = ["--steps", STEPS, "--guidance", GUIDANCE, "--batch_size", "48"]
    return "generate", [*arguments, *sampler]

  def train(name):
    arguments = [
      "--config",
      f"{os.path.relpath(CONFIGS / name)}.py:toy",
      "--workdir",
      out / "runs" / name,
    ]
    values = {"model": options.model, "cache": out / "cache", "seed": seed}
    values |= {"lora.seed": seed} | options.overrides
    return "train", arguments + [f"--config.{k}={v}" for k, v in values.items()]

  def measured(file, folder, figures):
    arguments = ["--images", folder, "--prompts", file]
    return "toyworld.measure", [
      *arguments,
      "--out",
      out / "figures" / f"{figures}.json",
    ]

  experts = ",".join(str(out / "runs" / name) for name in options.categories)
  merge = ["--experts", experts, "--method", options.merge]
  if options.merge.startswith("co_merge"):
    merge += ["--calibration", out / "cache"]
  images = {name: out / "images" / "experts" / name for name in options.categories}
  table = [
    Stage(
      "prompts",
      "unsafe prompts and their safe twins, for pairs and for the test",
      [
        prompts("pairs", options.pairs, pairs, *only),
        prompts("test", options.test, test, *only),
        *(
          prompts("test", options.test, tests[name], "--category", name)
          for name in options.categories
        ),
      ],
    ),
    Stage(
      "pairs",
      "both prompts of each pair, rendered from one noise by the model to be aligned",
      [generate(pairs, pairs.parent)],
    ),
    Stage(
      "encode",
      "the VAE and the tokenizer, once",
      [("encode", [*toy, "--pairs", pairs.parent, "--out", out / "cache"])],
    ),
    Stage(
      "train",
      "one expert for each category",
      [train(name) for name in options.categories],
    ),
    Stage(
      "merge",
      "the experts into one LoRA",
      [("merge", [*merge, "--out", out / "merged"])],
    ),
    Stage(
      "export",
      "a LoRA file that diffusers loads",
      [("export", ["--lora", out / "merged", *toy, "--out", out / "exported"])],
    ),
    Stage(
      "images",
      "test prompts by the base model, by each expert and by the merged LoRA",
      [
        generate(test, out / "images/base"),
        *(
          generate(tests[name], images[name], "--lora", out / "runs" / name)
          for name in options.categories
        ),
        generate(test, out / "images/merged", "--lora", out / "merged"),
      ],
    ),
    Stage(
      "measure",
      "symbols found and scenes read",
      [
        measured(test, out / "images/base", "base"),
        *(
          measured(tests[name], images[name], f"expert_{name}")
          for name in options.categories
        ),
        measured(test, out / "images/merged", "merged"),
      ],
    ),
  ]
  return [
    stage._replace(commands=[(c, [*map(str, line)]) for c, line in stage.commands])
    for stage in table
  ]


def run_stage(stage: Stage, number: str) -> dict[str, Any]:
  """Runs a stage's commands; returns what `timings` says of it."""
  print(f"\n{number}  {stage.name}: {stage.what}", flush=True)
  lines = []
  start = time.monotonic()
  for module, arguments in stage.commands:
    lines.append(shlex.join(["python", "-m", f"safetydpo_jax.{module}", *arguments]))
    print(f"$ {lines[-1]}", flush=True)
    importlib.import_module(f"safetydpo_jax.{module}").main(arguments)
  seconds = time.monotonic() - start
  print(f"{number}  {stage.name}: {seconds:.0f} s", flush=True)
  about = {"step": stage.name, "what": stage.what}
  return {**about, "seconds": seconds, "commands": lines}
