"""Whether a run's train step fits a slice, and how fast it can be.

The step is compiled for TPUs that are not there, with XLA's TPU compiler (libtpu, on
any x86-64 Linux machine). For GPUs there is no such compiler: their figures are
arithmetic, and say so.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax.errors import InputError
from safetydpo_jax.planning import measure, roofline
from safetydpo_jax.planning.chips import (
  GIB,
  Topology,
  keep_to_the_compiler,
  read_topology,
  tpu_devices,
)
from safetydpo_jax.runtime import sharding
from safetydpo_jax.runtime.manifest import versions, write_json
from safetydpo_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """Compiles the train step for chips that you do not have: does it fit?"""

  config: str
  """as for train; --config.NAME=VALUE overrides a value"""
  topology: str
  """the chips, for example v5e:4x4"""
  json: Path | None = None
  """also write the figures to this file"""
  largest_batch: bool = False
  """search for the most pairs that fit on a chip; four or more compilations"""

  def __post_init__(self):
    topology = read_topology(self.topology)
    if self.largest_batch and not topology.shape:
      raise InputError(
        f"--largest_batch needs the compiler, and there is none for {topology.name}; "
        "give a TPU topology"
      )
    if self.json and not self.json.absolute().parent.is_dir():
      raise InputError(
        f"--json {self.json}: there is no folder {self.json.parent}; make it first"
      )


def plan_step(config: RunConfig, options: PlanOptions) -> dict[str, Any]:
  """Compiles or counts, prints the plan, and returns it.

  Raises:
    InputError: the config does not fit the topology, or the compiler is not there.
  """
  keep_to_the_compiler()
  topology = read_topology(options.topology)
  sharding.use_precision(config.dtype)
  config, note = settle_batch(config, topology)
  if note:
    print(f"note             {note}")
  plan = make_plan(config, topology, options.largest_batch)
  print(describe(plan))
  if options.json:
    write_json(options.json, plan)
  return plan


def settle_batch(config: RunConfig, topology: Topology) -> tuple[RunConfig, str]:
  """The config with an accumulation that divides each chip's pairs.

  Returns:
    It, and a note on what `train` needs there, or "".

  Raises:
    InputError: the batch cannot be split over the chips.
  """
  rows, rest = divmod(config.batch_size, topology.count)
  if rest:
    raise InputError(
      f"config.batch_size is {config.batch_size} pairs; expected a multiple of the "
      f"{topology.count} chips of {topology.name}"
    )
  if not rows % config.accumulation:
    return config, ""
  divides = math.gcd(rows, config.accumulation)
  return dataclasses.replace(config, accumulation=divides), (
    f"config.accumulation is {config.accumulation}, which does not divide the {rows} "
    f"pair(s) that each chip has per step: planned with --config.accumulation={divides}"
    "; give train one that divides"
  )


def make_plan(config: RunConfig, topology: Topology, search: bool) -> dict[str, Any]:
  """All figures of a config on a topology, as written to JSON."""
  devices = tpu_devices(topology) if topology.shape else []
  if devices:
    found = measure.compile_step(config, topology, devices)
  else:
    found = measure.count_step(config, topology)
  plan = {
    "topology": topology.name,
    "chip": topology.chip.name,
    "chips": topology.count,
    "source": "compiled for the chip" if devices else "arithmetic, not compiled",
    "model": config.model,
    "remat": config.remat,
    "attention": config.attention,
    "mesh": config.to_dict()["mesh"],
    "pairs_per_step": config.batch_size,
    "accumulation": config.accumulation,
    "pairs_per_chip_at_once": config.batch_size
    // topology.count
    // config.accumulation,
    "steps": config.steps,
    "capacity": topology.chip.memory,
    **found,
    "estimate": roofline.estimate(
      topology,
      found["flops"],
      found["bytes"],
      found["collectives"],
      config.batch_size,
      config.steps,
      config.dtype,
      config.mesh.fsdp,
    ),
    "remat_needed": _remat_needed(config, topology, devices, found["fits"]),
    "versions": versions("libtpu"),
  }
  if search:
    plan["largest_pairs_per_chip"], _ = measure.largest_batch(config, topology, devices)
  return plan


def _remat_needed(
  config: RunConfig,
  topology: Topology,
  devices: Sequence[jax.Device],
  fits: bool | None,
) -> str:
  if not devices:
    return "not known without a compiler"
  if config.remat != "none":
    return f"on ({config.remat}); plan with --config.remat=none to see whether"
  if fits:
    return "no"
  full = dataclasses.replace(config, remat="full")
  if measure.compile_step(full, topology, devices)["fits"]:
    return "yes: it fits with --config.remat=full"
  return "yes, and --config.remat=full is not enough: raise accumulation or mesh.fsdp"


def describe(plan: dict[str, Any]) -> str:
  """The plan as a table to read."""
  memory, estimate = plan["memory"], plan["estimate"]
  gib = {name: f"{size / GIB:.2f} GiB" for name, size in memory.items()}
  rows = [
    ("chips", f"{plan['chips']} × {plan['chip']} ({plan['source']})"),
    (
      "step",
      f"{plan['model']}, {plan['pairs_per_step']} pairs: {plan['accumulation']} × "
      f"{plan['pairs_per_chip_at_once']} on each chip, remat {plan['remat']}, mesh "
      f"{plan['mesh']['data']} × {plan['mesh']['fsdp']}",
    ),
    ("weights", gib["weights"]),
    ("state", gib["state"]),
    ("temporaries", gib.get("temporaries", "not known")),
  ]
  verdict = {True: "fits", False: "does not fit", None: "weights and state fit"}
  total = plan.get("refusal") or f"{gib['total']} of {plan['capacity'] / GIB:.1f} GiB"
  rows.append(("memory", f"{total}: {verdict[plan['fits']]}"))
  rows.append(("remat needed", plan["remat_needed"]))
  if "largest_pairs_per_chip" in plan:
    rows.append(
      ("largest batch", f"{plan['largest_pairs_per_chip']} pairs a chip at once")
    )
  moved = f"{plan['bytes'] / 1e9:.1f} GB" if plan["bytes"] else "not known"
  rows += [
    ("operations", f"{plan['flops'] / 1e12:.2f} TFLOP a step and chip"),
    ("memory traffic", moved),
    ("flash kernels", str(plan["kernels"])),
  ]
  for kind, one in sorted(plan["collectives"].items()):
    rows.append((kind, f"{one['count']} a step, {one['bytes'] / 1e6:.2f} MB"))
  if "refusal" in plan:
    return "\n".join(f"{label:16} {value}" for label, value in rows)
  times = [
    f"{name} not known" if estimate[name] is None else f"{name} {estimate[name]:.4f} s"
    for name in ("compute", "memory", "links")
  ]
  rows.append(("time", f"{', '.join(times)}: bound by {estimate['bound']}"))
  for name, label in (
    ("roofline", "at the roofline"),
    ("reached", f"at {estimate['share_of_peak']:.0%} of peak"),
  ):
    one = estimate[name]
    rows.append(
      (
        label,
        f"{one['pairs_per_second']:.1f} pairs/s; {plan['steps']} steps in "
        f"{one['run_hours']:.2f} h = {one['run_chip_hours']:.2f} chip-hours; a cached "
        f"epoch ({roofline.EPOCH:,} examples) {one['epoch_chip_hours']:.2f} chip-hours",
      )
    )
  return "\n".join(f"{label:16} {value}" for label, value in rows)
