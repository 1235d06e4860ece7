"""One train step, compiled ahead of time for a topology, or counted by arithmetic.

The step is `training.step.jit_train_step`, given shapes in place of arrays.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from safetydpo_jax.planning import hlo, shapes
from safetydpo_jax.planning.chips import Topology
from safetydpo_jax.planning.flops import count_flops
from safetydpo_jax.runtime import sharding
from safetydpo_jax.training import initial_lora, optimizer
from safetydpo_jax.training.config import RunConfig
from safetydpo_jax.training.step import init_state, jit_train_step


def trace_step(
  config: RunConfig, mesh: Mesh, batch_size: int
) -> tuple[jax.stages.Traced, dict[str, int]]:
  """The traced step on a mesh, and bytes on one device of what lives between steps.

  Returns:
    The step, and {"weights", "state", "lora"}: the LoRA is part of the state.
  """
  pipeline = shapes.make_pipeline(config)
  tx = optimizer.make_optimizer(config)
  first = initial_lora.first_lora(config.lora, pipeline)
  state = jax.eval_shape(lambda: init_state(first.make(), tx))
  base = sharding.base_shardings(mesh, pipeline.params)
  step = jit_train_step(config, pipeline, mesh, tx, base)
  traced = step.trace(state, pipeline.params, shapes.batch_shapes(pipeline, batch_size))
  return traced, {
    "weights": shapes.bytes_of(pipeline.params, base),
    "state": shapes.bytes_of(state),
    "lora": shapes.bytes_of(state.lora),
  }


def compile_step(
  config: RunConfig, topology: Topology, devices: Sequence[jax.Device]
) -> dict[str, Any]:
  """What the compiler reports for the step, on each chip.

  Returns:
    `memory` in bytes (weights, state, the LoRA in it, and what the compiler found:
    arguments, temporaries, total), `fits`, `flops`, `bytes`, `collectives` and
    `kernels` (Pallas kernels). If the compiler refuses, `refusal` says why, and what
    only it knows is missing.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  traced, memory = trace_step(config, mesh, config.batch_size)
  found = {
    "memory": memory,
    "flops": count_flops(traced.jaxpr.jaxpr) / topology.count,
    "bytes": None,
    "collectives": {},
    "kernels": 0,
  }
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    refusal = hlo.used_and_limit(str(error)) or " ".join(str(error).split())[:160]
    return found | {"fits": False, "refusal": refusal}
  sizes, text = compiled.memory_analysis(), compiled.as_text()
  new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  memory |= {
    "arguments": sizes.argument_size_in_bytes,
    "temporaries": sizes.temp_size_in_bytes,
    "total": sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + new,
  }
  cost = compiled.cost_analysis()
  return found | {
    "fits": memory["total"] <= topology.chip.memory,
    "bytes": cost.get("bytes accessed", 0.0) * hlo.loop_factor(text),
    "collectives": hlo.collectives(text),
    "kernels": hlo.count_kernels(text),
  }


def count_step(config: RunConfig, topology: Topology) -> dict[str, Any]:
  """The same by arithmetic, without temporaries, bytes moved and exact collectives.

  One all-reduce of the LoRA's gradients and the step's metrics is what the CPU's
  compiler makes of a data mesh. With fsdp policy and reference share one gather of each
  weight, every microbatch; under remat the backward pass has its own.
  """
  sharding.axis_sizes(config.mesh.data, config.mesh.fsdp, topology.count)
  mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
  traced, memory = trace_step(config, mesh, config.batch_size // topology.count)
  collectives = {}
  if topology.count > 1:
    collectives["all-reduce"] = {"count": 1, "bytes": memory["lora"]}
  if config.mesh.fsdp > 1:
    gathers = (1 if config.remat == "none" else 2) * config.accumulation
    collectives["all-gather"] = {"count": gathers, "bytes": gathers * memory["weights"]}
    memory["weights"] //= config.mesh.fsdp
  total = memory["weights"] + memory["state"]
  return {
    "memory": memory | {"total": total},
    "fits": None if total <= topology.chip.memory else False,
    "flops": count_flops(traced.jaxpr.jaxpr),
    "bytes": None,
    "collectives": collectives,
    "kernels": 0,
  }


def largest_batch(
  config: RunConfig, topology: Topology, devices: Sequence[jax.Device]
) -> tuple[int, dict[int, int]]:
  """The most pairs that a chip holds at once, with accumulation 1.

  Memory is nearly affine in the number of pairs, so two compilations tell where to look
  next, at most eight times beyond what fits. The answer has been compiled, and so has
  one pair more, which does not fit.

  Returns:
    The number, 0 if none fit, and {pairs: bytes} of all that were compiled and fit.
  """
  used: dict[int, int] = {}
  tried: dict[int, bool] = {}

  def fits(pairs: int) -> bool:
    if pairs not in tried:
      size = pairs * topology.count
      larger = dataclasses.replace(config, batch_size=size, accumulation=1)
      found = compile_step(larger, topology, devices)
      tried[pairs] = found["fits"]
      print(f"  {pairs} pairs: {_summary(found)}", flush=True)
      if found["fits"]:
        used[pairs] = found["memory"]["total"]
    return tried[pairs]

  def expected(low: int) -> int:
    if len(used) < 2:
      return low + 1
    before, last = sorted(used)[-2:]
    slope = max((used[last] - used[before]) / (last - before), 1.0)
    return last + int((topology.chip.memory - used[last]) // slope)

  if not fits(1):
    return 0, used
  low, high, step, near = 1, None, 1, False
  while high != low + 1:
    if high is None:
      pairs = expected(low)
      near = low < pairs <= 8 * low
      pairs = min(max(pairs, low + step), 8 * low)
    else:  # close to the expected limit, else halfway
      pairs = max(high - step, (low + high) // 2) if near else (low + high) // 2
    if fits(pairs):
      step = 1 if near and high is None else 2 * step
      low = pairs
    else:
      step = 1 if high is None else 2 * step
      high = pairs
  return low, used


def _summary(found: dict[str, Any]) -> str:
  if "refusal" in found:
    return f"does not fit ({found['refusal']})"
  return f"{found['memory']['total'] / 2**30:.2f} GiB"
