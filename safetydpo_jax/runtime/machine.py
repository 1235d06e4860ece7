"""What a run runs on, for manifests and reports."""

import os
import platform

import jax


def _cores() -> int:
  """The processor cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def describe() -> dict[str, str | int]:
  """The first device's platform and kind, the processor's architecture, its cores."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "architecture": platform.machine(),
    "cores": _cores(),
  }
