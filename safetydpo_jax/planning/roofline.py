"""The least time a step can take on a chip, and what a run costs at that speed.

    compute = operations / peak,  memory = bytes / bandwidth,
    links   = Σ factor · (n − 1) / n · bytes of the result / (links / 2)       (1)
    step    = max(compute, memory) + links                                     (2)

on n chips: those of `mesh.fsdp` for a gather, all of them otherwise. The factor is 2
for an all-reduce, which is a reduce-scatter and an all-gather, else 1. There is no
reduce-scatter by itself, since base weights get no gradient. No step is as fast as (2);
half of the peak is good.
"""

from collections.abc import Mapping
from typing import Any

from safetydpo_jax.planning.chips import Topology

# Share of the peak that full fine-tuning of SD2 at 512 pixels from cached latents
# reached in MLPerf's logs: 42 to 45 % on v5p, 27 to 31 % on H100.
REACHED = {"tpu": 0.40, "gpu": 0.30}
# Captions of the published dataset, each an example: 15,690 pairs, two prompts each.
EPOCH = 31_380


def link_seconds(
  collectives: Mapping[str, Mapping[str, int]], chips: int, fsdp: int, links: float
) -> float:
  """Equation (1) for the collectives of `hlo.collectives`."""
  total = 0.0
  for kind, one in collectives.items():
    group = fsdp if kind == "all-gather" and fsdp > 1 else chips
    factor = 2 if kind == "all-reduce" else 1
    total += factor * one["bytes"] * (group - 1) / group
  return total / (links / 2)


def estimate(
  topology: Topology,
  flops: float,
  moved: float | None,
  collectives: Mapping[str, Mapping[str, int]],
  pairs: int,
  steps: int,
  dtype: str = "bfloat16",
  fsdp: int = 1,
) -> dict[str, Any]:
  """Equation (2), and what follows for a run.

  Args:
    topology: the chips.
    flops: operations a step on each chip.
    moved: bytes to and from memory a step on each chip; None if not known.
    collectives: of a step on each chip.
    pairs: a step, on all chips.
    steps: of the run.
    dtype: of the products.
    fsdp: chips that share one copy of the base weights.

  Returns:
    Seconds `compute`, `memory` (None if not known) and `links`; the largest of them,
    `bound`; and under `roofline` and `reached` the seconds of a step,
    `pairs_per_second`, hours of the run, and chip-hours of the run and of one epoch of
    the published dataset.
  """
  chip = topology.chip
  peak = chip.flops if dtype == "bfloat16" else chip.float32
  compute, memory = flops / peak, (moved or 0.0) / chip.bandwidth
  links = link_seconds(collectives, topology.count, fsdp, chip.links)
  times = {"compute": compute, "memory": memory, "links": links}
  share = REACHED["tpu" if topology.shape else "gpu"]

  def run(seconds: float) -> dict[str, float]:
    return {
      "step_seconds": seconds,
      "pairs_per_second": pairs / seconds,
      "run_hours": steps * seconds / 3600,
      "run_chip_hours": steps * seconds / 3600 * topology.count,
      "epoch_chip_hours": EPOCH / pairs * seconds / 3600 * topology.count,
    }

  return {
    **times,
    "memory": None if moved is None else memory,
    "bound": max(times, key=times.__getitem__),
    "share_of_peak": share,
    "roofline": run(max(compute, memory) + links),
    "reached": run(max(compute / share, memory) + links),
  }
