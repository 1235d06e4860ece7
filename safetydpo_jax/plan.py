"""Whether a run fits a slice, and how fast it can be: `python -m safetydpo_jax.plan …`.

Compiles the train step of a config for TPUs that are not there, with XLA's TPU compiler
(libtpu, on any x86-64 Linux machine), and prints for each chip the memory, operations,
traffic and a roofline estimate. No weights are read. For GPUs there is no such
compiler: their figures are arithmetic, and say so.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax import train
from safetydpo_jax.errors import InputError, run_command
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
from safetydpo_jax.training.config import check_config

EXAMPLE = """example:
  python -m safetydpo_jax.plan --config configs/hate.py:sd15 --topology v5e:4x4

topologies: v5e:4x4, v6e:8x8, v4:2x2x2, v5p:2x2x1 and the like (Cloud TPU's shapes) are
compiled for, 10 to 50 minutes each at full size; gpu:h100x8, gpu:h200x8, gpu:a100x8 are
arithmetic.
"""


def parse_arguments(
  arguments: list[str] | None = None,
) -> tuple[argparse.Namespace, Any]:
  """The command line, and the config with its overrides."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.plan",
    description="Compiles the train step for chips that are not here: does it fit?",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--config",
    required=True,
    metavar="FILE[:VARIANT]",
    help="as train's; any value is overridden by --config.NAME=VALUE",
  )
  add("--topology", required=True, metavar="T", help="the chips, for example v5e:4x4")
  add("--json", type=Path, metavar="FILE", help="also write the figures there")
  add(
    "--largest_batch",
    action="store_true",
    help="search for the most pairs a chip holds; four or more compilations",
  )
  options, overrides = parser.parse_known_args(arguments)
  for override in overrides:
    if not override.startswith("--config."):
      parser.error(
        f"unrecognized argument {override}; overrides are --config.NAME=VALUE"
      )
  line = ["--config", options.config, "--workdir", ".", *overrides]
  config, _ = train.parse_arguments(line)
  return options, config


def settle_batch(config: Any, topology: Topology) -> str:
  """Checks the config for these chips; lowers an accumulation that does not divide.

  Returns:
    A note on what `train` needs there, or "".
  """
  others = config.copy_and_resolve_references()
  others.cache = others.cache or "not read"
  others.batch_size, others.accumulation = jax.device_count(), 1
  if config.batch_size > 0 and config.accumulation > 0:
    check_config(others)
  else:
    check_config(config)
  rows, rest = divmod(config.batch_size, topology.count)
  if rest:
    raise InputError(
      f"config.batch_size is {config.batch_size} pairs; expected a multiple of the "
      f"{topology.count} chips of {topology.name}"
    )
  if rows % config.accumulation:
    asked, config.accumulation = (
      config.accumulation,
      math.gcd(rows, config.accumulation),
    )
    return (
      f"config.accumulation is {asked}, which does not divide each chip's {rows} "
      f"pair(s) a step: planned with --config.accumulation={config.accumulation}; give "
      "train one that divides"
    )
  return ""


def make_plan(config: Any, topology: Topology, search: bool) -> dict[str, Any]:
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
    "mesh": config.mesh.to_dict(),
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


def _remat_needed(config, topology, devices, fits) -> str:
  if not devices:
    return "not known without a compiler"
  if config.remat != "none":
    return f"on ({config.remat}); plan with --config.remat=none to see whether"
  if fits:
    return "no"
  full = config.copy_and_resolve_references()
  full.remat = "full"
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


def main(arguments: list[str] | None = None) -> None:
  """Reads the config, compiles or counts, prints."""
  options, config = parse_arguments(arguments)
  keep_to_the_compiler()
  topology = read_topology(options.topology)
  if options.largest_batch and not topology.shape:
    raise InputError(
      f"--largest_batch needs the compiler, which {topology.name} has not; TPUs have"
    )
  if options.json and not options.json.absolute().parent.is_dir():
    raise InputError(f"--json {options.json}: there is no folder for it")
  sharding.use_precision(config.dtype)
  note = settle_batch(config, topology)
  if note:
    print(f"note             {note}")
  plan = make_plan(config, topology, options.largest_batch)
  print(describe(plan))
  if options.json:
    write_json(options.json, plan)


if __name__ == "__main__":
  run_command(main)
