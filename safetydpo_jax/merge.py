"""Merges experts into one LoRA: `python -m safetydpo_jax.merge --experts A,B …`.

In: run directories, merged directories and LoRA files. Out: an expert's directory
(`formats/expert.py`) that `generate` and `export` take like any other: lora/ and
expert.json, whose category is "merged", whose alpha is its rank (the scale is folded
in), and which names the method, its options and every expert with the sha256 of its
factors.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from safetydpo_jax import lora as lora_lib
from safetydpo_jax import merging, sharding
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.export import adapted_layers
from safetydpo_jax.formats import expert, loras, manifest
from safetydpo_jax.formats.pipeline import load_pipeline

EXAMPLE = """example:
  python -m safetydpo_jax.merge --experts runs/hate,runs/violence --method linear \\
    --out merged
"""
MERGED = "merged"  # the category of what this command writes

# Which options a method reads, besides experts and model.
OPTIONS = {
  "linear": ("weights",),
  "svd": ("weights", "rank"),
  "ties": ("weights", "rank", "density"),
  "dare_linear": ("weights", "rank", "density", "seed"),
  "dare_ties": ("weights", "rank", "density", "seed"),
  "magnitude": ("weights", "rank", "density"),
}
DEFAULTS = {"density": merging.DENSITY, "seed": 0}


class Expert(NamedTuple):
  """One LoRA to merge: what it was called, its tree, its expert.json ({}: foreign)."""

  name: str
  lora: dict
  about: dict[str, Any]
  sha256: str


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.merge",
    description="Merges LoRA experts of one base model into a single LoRA.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--experts", required=True, metavar="L,L,…", help="runs or LoRA files")
  add("--method", required=True, choices=tuple(OPTIONS))
  add("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
  add("--model", metavar="M", help="the base model, for LoRA files that do not say it")
  add(
    "--weights",
    metavar="W[,W…]",
    help="one number for all experts or one for each (default: 1/N for N experts, "
    "their mean; 1 gives their sum, as diffusers' set_adapters does)",
  )
  add("--rank", type=int, help="of the result (default: the experts' largest)")
  add(
    "--density", type=float, help=f"share of entries kept (default: {merging.DENSITY})"
  )
  add("--seed", type=int, help="of what DARE drops (default: 0)")
  add("--variant", help='of the model\'s files, for example "fp16"')
  return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
  """Refuses what the method does not read and numbers that cannot be meant."""
  read = OPTIONS[options.method]
  for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
    if getattr(options, name) is not None and name not in read:
      others = ", ".join(method for method, names in OPTIONS.items() if name in names)
      raise InputError(
        f"--method {options.method} does not read --{name}; leave it out, or take "
        f"one of {others}"
      )
    if name in read and getattr(options, name) is None:
      setattr(options, name, DEFAULTS.get(name))
  if options.rank is not None and options.rank < 1:
    raise InputError(f"--rank is {options.rank}; expected 1 or more")
  if options.density is not None and not 0 < options.density <= 1:
    raise InputError(f"--density is {options.density}; expected above 0, up to 1")
  if options.seed is not None and not 0 <= options.seed < 2**32:
    raise InputError(f"--seed is {options.seed}; expected 0 to 2^32 - 1")


def parse_weights(text: str | None, count: int) -> list[float]:
  """`0.5` or `0.2,0.8` → one number for each of `count` experts; None: 1 / count."""
  if text is None:
    return [1 / count] * count
  try:
    numbers = [float(number) for number in text.split(",")]
  except ValueError:
    numbers = [math.nan]
  if not all(map(math.isfinite, numbers)) or len(numbers) not in (1, count):
    raise InputError(
      f"--weights is {text!r}; expected one finite number, or {count} with commas "
      f"between them, one for each expert"
    )
  return numbers * count if len(numbers) == 1 else numbers


def check_out(out: Path, names: Sequence[str]) -> None:
  """Refuses a folder that holds anything but an earlier merge."""
  if any(Path(name).absolute() == out.absolute() for name in names):
    raise InputError(f"--out {out} is one of the experts; choose another --out")
  try:
    there = sorted(file.name for file in out.iterdir()) if out.exists() else []
  except OSError as error:
    raise InputError(f"--out {out} is no folder: {error.strerror}") from error
  if expert.MANIFEST in there:
    about = manifest.read_json(out / expert.MANIFEST, "merged expert")
    if isinstance(about, dict) and about.get("category") == MERGED:
      return
  elif set(there) <= {"lora"}:  # a merge that was stopped before its manifest
    return
  raise InputError(
    f"--out {out} holds something else than a merged expert ({there[0]}); choose "
    "another --out"
  )


def read_experts(names: Sequence[str]) -> list[Expert]:
  """The LoRAs, each checked by itself and against the ones before it.

  Raises:
    InputError: one is not there, damaged, holds NaN, or stands there twice.
  """
  experts: list[Expert] = []
  for name in names:
    if not name:
      raise InputError("--experts has an empty name; expected L,L,… without spaces")
    tree, about = loras.load_lora(name)
    for path, leaf in flatten_dict(tree).items():
      if not np.isfinite(leaf).all():
        raise InputError(
          f"{name}: {'/'.join(path)} holds NaN or infinity; train the expert again"
        )
    this = Expert(name, tree, about, merging.factors_sha256(tree))
    for other in experts:
      if other.sha256 == this.sha256:
        raise InputError(
          f"{other.name} and {name} are the same LoRA; give each expert once"
        )
      check_same_model(other, this)
    experts.append(this)
  return experts


def check_same_model(one: Expert, other: Expert) -> None:
  """Refuses two LoRAs that cannot belong to one base model."""
  bases = [e.about["base"] for e in (one, other) if e.about]
  if len({base["fingerprint"] for base in bases}) > 1:
    raise InputError(
      f"{one.name} was trained on {bases[0]['name']} (fingerprint "
      f"{bases[0]['fingerprint']}), {other.name} on {bases[1]['name']} "
      f"({bases[1]['fingerprint']}); merge experts of one base model"
    )
  shapes = [
    {path: leaf.shape[path[-1] == "b"] for path, leaf in flatten_dict(e.lora).items()}
    for e in (one, other)
  ]
  for path in shapes[0].keys() & shapes[1].keys():
    if shapes[0][path] != shapes[1][path]:
      raise InputError(
        f"{'/'.join(path)} is for {shapes[0][path]} features in {one.name} and for "
        f"{shapes[1][path]} in {other.name}; merge experts of one base model"
      )


def find_base(experts: Sequence[Expert], options: argparse.Namespace) -> dict[str, str]:
  """Name and fingerprint of the base model, from --model or the experts.

  Raises:
    InputError: neither says it, or they disagree.
  """
  if options.model:
    pipeline = load_pipeline(options.model, components=(), variant=options.variant)
    for this in experts:
      loras.check_fits(this.name, this.about, pipeline.fingerprint)
      lora_lib.check_shapes(pipeline.unet_shapes(), this.lora)
    return {"name": options.model, "fingerprint": pipeline.fingerprint}
  for this in experts:
    if this.about:
      return this.about["base"]
  raise InputError(
    f"{experts[0].name} does not say which model it was made for; give --model"
  )


def describe(this: Expert) -> dict[str, Any]:
  """An expert's row in expert.json."""
  about, lora = this.about, this.lora
  config = about.get("config") or {}
  return {
    "path": this.name,
    "sha256": this.sha256,
    "category": about.get("category"),
    "rank": lora_lib.rank_of(lora),
    "targets": about.get("targets") or adapted_layers(lora),
    "step": about.get("step"),
    "seed": about.get("seed"),
    "lora_seed": (config.get("lora") or {}).get("seed"),
    "dataset": about.get("dataset"),
  }


def main(arguments: list[str] | None = None) -> None:
  """Reads, checks, merges, writes."""
  options = parse_arguments(arguments)
  names = options.experts.split(",")
  check_options(options)
  sharding.initialize_hosts()
  check_out(options.out, names)
  weights = parse_weights(options.weights, len(names))
  experts = read_experts(names)
  base = find_base(experts, options)

  settings = {name: getattr(options, name) for name in OPTIONS[options.method]}
  settings["weights"] = weights
  merged = merging.METHODS[options.method]([this.lora for this in experts], **settings)

  # Orbax writes one tree of all hosts.
  replicated = NamedSharding(sharding.make_mesh(), sharding.REPLICATED)
  rank = lora_lib.rank_of(merged)
  about = {
    "category": MERGED,
    "rank": rank,
    "alpha": rank,
    "targets": adapted_layers(merged),
    "base": {"name": base["name"], "fingerprint": base["fingerprint"]},
    "method": options.method,
    "options": settings,
    "experts": [describe(this) for this in experts],
  }
  expert.write_expert(options.out, sharding.place(merged, replicated), about)
  if jax.process_index() == 0:
    print(
      f"{options.out}: {options.method} of {len(experts)} experts, rank {rank}, "
      f"{lora_lib.num_parameters(merged):,} parameters"
    )


if __name__ == "__main__":
  run_command(main)
