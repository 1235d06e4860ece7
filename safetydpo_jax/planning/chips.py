"""Accelerators by name: published figures, and TPU devices to compile for without one.

A topology is `GENERATION:SHAPE`, in Cloud TPU's words (v5e:4x4, v4:2x2x2), or
`gpu:NAMExCOUNT` (gpu:h100x8). libtpu contains XLA's TPU compiler; it needs no TPU, but
takes a lock that only one process on a machine can hold.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax

from safetydpo_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, or one GPU.

  Attributes:
    name: as its maker calls it.
    flops: peak of dense bfloat16 products per second.
    float32: the same for float32; a TPU takes six passes in bfloat16.
    memory: bytes.
    bandwidth: of the memory, bytes per second.
    links: bytes per second to other chips, both directions together.
    shape: axes of a topology; 0 for GPUs.
    options: what the compiler needs to know besides the topology.
  """

  name: str
  flops: float
  memory: float
  bandwidth: float
  links: float
  shape: int = 0
  options: tuple[tuple[str, Any], ...] = ()
  float32_flops: float = 0.0

  @property
  def float32(self) -> float:
    return self.float32_flops or self.flops / 6


# Cloud TPU's pages "TPU v4", "v5e", "v5p", "v6e" (docs.cloud.google.com/tpu/docs), and
# NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, without sparsity. Cloud
# TPU's gigabytes of memory are 2³⁰ bytes, NVIDIA's 10⁹. v4's page gives no figure for
# the links of one chip: 24 TB/s of bisection over 512 links are 50 GB/s per link and
# direction, and a chip has six.
CHIPS = {
  "v4": Chip(
    "TPU v4", 275e12, 32 * GIB, 1200e9, 600e9, 3, (("chip_config_name", "megacore"),)
  ),
  "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 400e9, 2),
  "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 1200e9, 3),
  "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1638e9, 800e9, 2),
  "a100": Chip("A100 80GB", 312e12, 80e9, 2039e9, 600e9, float32_flops=19.5e12),
  "h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, 900e9, float32_flops=67e12),
  "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 900e9, float32_flops=67e12),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """`count` chips of one kind; `shape` is "4x4", or "" for GPUs."""

  name: str
  chip: Chip
  count: int
  shape: str


def read_topology(text: str) -> Topology:
  """Reads "v5e:4x4" or "gpu:h100x8".

  Raises:
    InputError: there is no such chip, or it does not come in that shape.
  """
  kind, _, rest = text.lower().partition(":")
  if kind == "gpu":
    match = re.fullmatch(r"([a-z]\w*?)(?:x(\d+))?", rest)
    kind, shape = (match[1], match[2] or "1") if match else (rest, "")
    gpu = True
  else:
    shape, gpu = rest, False
  chip = CHIPS.get(kind)
  if chip is None or gpu != (chip.shape == 0):
    tpus = ", ".join(
      f"{k}:{'x'.join(['2'] * c.shape)}" for k, c in CHIPS.items() if c.shape
    )
    gpus = ", ".join(f"gpu:{k}x8" for k, c in CHIPS.items() if not c.shape)
    raise InputError(f"--topology {text} is unknown; expected one like {tpus}, {gpus}")
  axes = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)
  if not axes or shape.count("x") + 1 != max(chip.shape, 1):
    example = "x".join(["4"] * chip.shape) or f"gpu:{kind}x8"
    raise InputError(
      f"--topology {text}: {chip.name} comes in shapes like {example}, not {shape!r}"
    )
  count = math.prod(map(int, shape.split("x")))
  return Topology(text.lower(), chip, count, shape if chip.shape else "")


def keep_to_the_compiler() -> None:
  """Leaves the machine's accelerators alone; call it before JAX looks for them."""
  jax.config.update("jax_platforms", "cpu")
  # Otherwise libtpu asks a TPU machine's metadata server for these, for minutes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_WORKER_ID", "0")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def tpu_devices(topology: Topology) -> list[jax.Device]:
  """Devices that programs can be compiled for, and not run on.

  Raises:
    InputError: libtpu is not installed or in use, or does not know the topology.
  """
  from jax.experimental import topologies

  keep_to_the_compiler()
  if not (os.environ.get("TPU_LIBRARY_PATH") or _has_libtpu()):
    raise InputError(
      f"--topology {topology.name} needs the TPU compiler, which is not installed; "
      'pip install "jax[tpu]"'
    )
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name, **dict(topology.chip.options)
    )
  except Exception as error:  # JaxRuntimeError, or ValueError, by jaxlib's version
    reason = " ".join(str(error).split())
    if re.search("lockfile|in use|already", reason):
      raise InputError(
        "another process on this machine uses libtpu, which admits one at a time; run "
        f"plan again when it has finished ({reason[:160]})"
      ) from error
    raise InputError(
      f"--topology {topology.name}: libtpu refuses it ({reason[:160]})"
    ) from error
  if len(found.devices) != topology.count:
    raise InputError(
      f"--topology {topology.name}: libtpu makes {len(found.devices)} devices of "
      f"{topology.count} chips; plan needs one device per chip"
    )
  return list(found.devices)


def _has_libtpu() -> bool:
  import importlib.util

  return importlib.util.find_spec("libtpu") is not None
