"""Which accelerators JAX looks for: without a TPU, libtpu is not loaded.

`jax[tpu]` brings libtpu, which also holds the TPU compiler that `plan` uses. Wherever
it is installed JAX loads it to look for a TPU, and without one libtpu writes a stack
trace to stderr and takes the lock that only one process of a machine can hold. The
decision is made when the package is imported, before JAX chooses its backends:

  JAX_PLATFORMS or `jax_platforms` is set   the user's choice is kept
  libtpu is not installed, or a TPU is here  JAX's own search
  an AMD GPU                                 JAX's own search
  an NVIDIA GPU and JAX's plugin for it      cuda, cpu
  otherwise                                  cpu

The standard library is enough for it: commands that need no JAX do not load JAX.
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Set on Cloud TPU VMs, by GKE in pods with TPUs, or by those who start a TPU by hand.
TPU_VARIABLES = (
  "CLOUD_TPU_TASK_ID",
  "JAX_FORCE_TPU_INIT",
  "TPU_ACCELERATOR_TYPE",
  "TPU_CHIPS_PER_HOST_BOUNDS",
  "TPU_CHIPS_PER_PROCESS_BOUNDS",
  "TPU_NAME",
  "TPU_PROCESS_ADDRESSES",
  "TPU_TOPOLOGY",
  "TPU_VISIBLE_CHIPS",
  "TPU_WORKER_HOSTNAMES",
  "TPU_WORKER_ID",
)
GOOGLE = "0x1ae0"  # the PCI vendor
NETWORK_AND_DISK = ("0x0042", "0x001f")  # Google's PCI devices in VMs without a TPU
# As jax._src.hardware_utils has them.
NVIDIA = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")
AMD = "dev/kfd"
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def choose() -> None:
  """Tells JAX what to look for, if libtpu would be loaded for nothing."""
  platforms = platforms_without_tpu(os.environ, Path("/"))
  if platforms is None:
    return
  jax = sys.modules.get("jax")
  if jax is None:
    os.environ["JAX_PLATFORMS"] = platforms  # JAX reads it when it is imported
  elif not jax.config.jax_platforms:
    jax.config.update("jax_platforms", platforms)


def platforms_without_tpu(environment: Mapping[str, str], root: Path) -> str | None:
  """The value of JAX_PLATFORMS that keeps libtpu out, or None to change nothing.

  Args:
    environment: the process's variables.
    root: where /dev and /sys are.
  """
  if environment.get("JAX_PLATFORMS") or not _is_installed("libtpu"):
    return None
  if _has_tpu(environment, root) or (root / AMD).exists():
    return None
  if not any((root / device).exists() for device in NVIDIA):
    return "cpu"
  hidden = environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
  if hidden or not any(map(_is_installed, CUDA_PLUGINS)):
    return "cpu"
  return "cuda,cpu"


def _has_tpu(environment: Mapping[str, str], root: Path) -> bool:
  if any(environment.get(name) for name in TPU_VARIABLES):
    return True
  if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
    return True
  return any(map(_may_be_tpu, root.glob("sys/bus/pci/devices/*")))


def _may_be_tpu(device: Path) -> bool:
  """Whether it is Google's and not of a kind that any VM has; TPUs to come are too."""
  try:
    if (device / "vendor").read_text().strip() != GOOGLE:
      return False
    return (device / "device").read_text().strip() not in NETWORK_AND_DISK
  except OSError:  # a device that is gone
    return False


def _is_installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None
