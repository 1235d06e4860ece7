"""Experts to merge: read, and checked against each other."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.loras.load import check_fits, load_lora
from safetydpo_jax.formats.loras.write import adapted_layers
from safetydpo_jax.lora import LoraTree


class Expert(NamedTuple):
  """One LoRA to merge: its name, its tree, its expert.json ({}: a foreign file)."""

  name: str
  lora: LoraTree
  about: dict[str, Any]
  sha256: str


def read_experts(
  names: Sequence[str],
  any_base: bool = False,
  unet_config: Mapping[str, Any] | None = None,
) -> list[Expert]:
  """The LoRAs, each checked by itself and against the ones before it.

  Args:
    names: L each.
    any_base: they may have been trained on different models.
    unet_config: the base UNet's config.json, if it is known; see `load_lora`.

  Raises:
    InputError: one is missing, is damaged, holds NaN, or is listed twice.
  """
  experts: list[Expert] = []
  for name in names:
    if not name:
      raise InputError("--experts has an empty name; expected L,L,… without spaces")
    tree, about = load_lora(name, unet_config)
    check_is_lora(name, tree)
    for path, leaf in flatten_dict(tree).items():
      if not np.isfinite(leaf).all():
        raise InputError(
          f"{name}: {'/'.join(path)} holds NaN or infinity; train the expert again"
        )
    this = Expert(name, tree, about, lora_lib.factors_sha256(tree))
    for other in experts:
      if other.sha256 == this.sha256:
        raise InputError(
          f"{other.name} and {name} are the same LoRA; give each expert once"
        )
      check_same_model(other, this, any_base)
    experts.append(this)
  return experts


def check_is_lora(name: str, tree: LoraTree) -> None:
  """Refuses a tree whose layers are not {'a': (…, in, r), 'b': (r, out)}."""
  shapes: dict[tuple, dict] = {}
  for path, leaf in flatten_dict(tree).items():
    shapes.setdefault(path[:-1], {})[path[-1]] = np.shape(leaf)
  for path, parts in shapes.items() or [((), {})]:
    if sorted(parts) != ["a", "b"] or not (
      len(parts["a"]) in (2, 4)
      and len(parts["b"]) == 2
      and parts["a"][-1] == parts["b"][0]
    ):
      raise InputError(
        f"{name}: {'/'.join(path) or 'it'} is not a LoRA layer, a (in, r) and b (r, "
        "out); train the expert again"
      )


def check_same_model(one: Expert, other: Expert, any_base: bool) -> None:
  """Refuses two LoRAs that cannot belong to one base model."""
  bases = [e.about["base"] for e in (one, other) if e.about]
  different = len({base["fingerprint"] for base in bases}) > 1
  if different and not any_base:
    raise InputError(
      f"{one.name} was trained on {bases[0]['name']} (fingerprint "
      f"{bases[0]['fingerprint']}), {other.name} on {bases[1]['name']} "
      f"({bases[1]['fingerprint']}); merge experts of one base model, or, if one is a "
      "fine-tune of the other, add --model and --any_base"
    )
  shapes = [
    {
      path: leaf.shape[-2 if path[-1] == "a" else 1]
      for path, leaf in flatten_dict(e.lora).items()
    }
    for e in (one, other)
  ]
  for path in shapes[0].keys() & shapes[1].keys():
    if shapes[0][path] != shapes[1][path]:
      raise InputError(
        f"{'/'.join(path)} is for {shapes[0][path]} features in {one.name} and for "
        f"{shapes[1][path]} in {other.name}; merge experts of one base model"
      )


def find_base(
  experts: Sequence[Expert], pipeline: Pipeline | None, any_base: bool = False
) -> dict[str, str]:
  """Name and fingerprint of the base model, from it or from the experts.

  Raises:
    InputError: no expert names it, they name several and there is no `pipeline`, or
      they do not fit it.
  """
  if pipeline:
    for this in experts:
      check_fits(this.name, this.about, pipeline.fingerprint, any_base)
      lora_lib.check_shapes(pipeline.unet_shapes(), this.lora)
    return {"name": pipeline.name, "fingerprint": pipeline.fingerprint}
  bases = [this.about["base"] for this in experts if this.about]
  if len({base["fingerprint"] for base in bases}) > 1:
    raise InputError(
      "--any_base: the experts were trained on different models; give the --model that "
      "the merged LoRA is for"
    )
  for base in bases:
    return {"name": base["name"], "fingerprint": base["fingerprint"]}
  raise InputError(
    f"{experts[0].name} does not say which model it was made for; give --model"
  )


def lora_seed(this: Expert) -> int | None:
  """The seed of the expert's first `a`, None if it is unknown."""
  config = this.about.get("config")
  lora = config.get("lora") if isinstance(config, dict) else None
  seed = lora.get("seed") if isinstance(lora, dict) else None
  return seed if isinstance(seed, int) else None


def first_a(this: Expert) -> str | None:
  """What decided the expert's first `a`: its seed, or the LoRA it was started from."""
  init = this.about.get("init")
  if isinstance(init, dict):
    return f"lora.init {str(init.get('sha256'))[:12]}"
  seed = lora_seed(this)
  return None if seed is None else f"lora.seed {seed}"


def check_same_layers(experts: Sequence[Expert]) -> None:
  """Refuses experts that adapt different layers."""
  first = flatten_dict(experts[0].lora).keys()
  for this in experts[1:]:
    if difference := sorted(first ^ flatten_dict(this.lora).keys()):
      name = "/".join(difference[0][:-1])
      have, lack = experts[0].name, this.name
      if difference[0] not in first:
        have, lack = lack, have
      raise InputError(
        f"{have} adapts {name} and {lack} does not: Co-Merge compares experts layer by "
        "layer; retrain one with the other's lora.targets, or use --method linear"
      )


def check_same_units(experts: Sequence[Expert]) -> None:
  """Refuses experts whose rank units cannot be compared; warns if that is unknown.

  Unit k of two experts' `a` means the same only if both started from one `a`.
  """
  for this in experts[1:]:
    ranks = lora_lib.rank_of(experts[0].lora), lora_lib.rank_of(this.lora)
    shapes = [
      {path: leaf.shape for path, leaf in flatten_dict(e.lora).items()}
      for e in (experts[0], this)
    ]
    if shapes[0] != shapes[1]:
      raise InputError(
        f"{experts[0].name} has rank {ranks[0]}, {this.name} rank {ranks[1]} or other "
        "ranks in some layers: co_merge_factor needs equal ranks; retrain one, or use "
        "--method co_merge_product"
      )
  starts = {first_a(this): this.name for this in experts}
  known = [start for start in starts if start is not None]
  if len(known) > 1:
    raise InputError(
      f"{starts[known[0]]} has {known[0]}, {starts[known[1]]} has {known[1]}: "
      "co_merge_factor needs experts with the same start; retrain one, or use --method "
      "co_merge_product"
    )
  if None in starts and len(experts) > 1:
    print(
      f"warning: {starts[None]} does not record its lora.seed; co_merge_factor is "
      "meaningful only if all experts started from one `a`",
      file=sys.stderr,
    )


def labels(experts: Sequence[Expert]) -> list[str]:
  """A short name for each: its category, or its file's name, or its number."""
  for names in (
    [str(this.about.get("category")) for this in experts],
    [Path(this.name).stem for this in experts],
  ):
    if len(set(names)) == len(names) and "None" not in names:
      return names
  return [f"expert {n + 1}" for n in range(len(experts))]


def describe(this: Expert) -> dict[str, Any]:
  """An expert's row in expert.json."""
  about, lora = this.about, this.lora
  return {
    "path": this.name,
    "sha256": this.sha256,
    "category": about.get("category"),
    "rank": lora_lib.rank_of(lora),
    "targets": about.get("targets") or adapted_layers(lora),
    "step": about.get("step"),
    "seed": about.get("seed"),
    "lora_seed": lora_seed(this),
    "dataset": about.get("dataset"),
  }
