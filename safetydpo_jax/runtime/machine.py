"""What a run runs on, for manifests and reports."""

import os
import platform

import jax


def describe() -> dict[str, str | int]:
  """The first device's platform and kind, the processor's architecture, its cores."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "architecture": platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
  }
