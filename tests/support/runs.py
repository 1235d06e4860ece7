"""Commands run as users run them, and what they leave behind, for the tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]

# What makes the preset fit a tiny random checkpoint: quick, in float32, no warm-up.
TINY = {
  "steps": 20,
  "batch_size": 16,
  "accumulation": 2,
  "learning_rate": 1e-4,
  "warmup_steps": 0,
  "log_every": 1,
  "dtype": "float32",
}


def train_arguments(model, cache, workdir, config="hate", **changes) -> list[str]:
  """Arguments of `safetydpo_jax.train` for a tiny run."""
  values = {"model": model, "cache": cache, **TINY, **changes}
  return [
    f"--config={ROOT / 'configs' / config}.py",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in values.items()),
  ]


def start(command: str, arguments: list, devices: int = 1, **environment):
  """Starts `python -m safetydpo_jax.<command>` on `devices` virtual CPU devices."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-m", f"safetydpo_jax.{command}", *map(str, arguments)],
    cwd=ROOT,
    env={
      **os.environ,
      # Level 1: half the time of compiling. At 0, where the tests are, a training run's
      # loops take many times as long.
      "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=1"
      " --xla_cpu_parallel_codegen_split_count=1",
      **environment,
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def free_address() -> str:
  """An address of this machine that nobody listens on."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return f"localhost:{free.getsockname()[1]}"


def start_hosts(command: str, arguments: list, count: int) -> list[subprocess.Popen]:
  """Starts a command as `count` processes of one job, on one device each."""
  address = free_address()
  return [
    start(
      command,
      arguments,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES=str(count),
      JAX_PROCESS_ID=str(index),
    )
    for index in range(count)
  ]


def leave_one_device(monkeypatch):
  """Hides all local devices but one."""
  first = jax.local_devices()[:1]
  monkeypatch.setattr(jax, "local_devices", lambda *_, **__: first)
  monkeypatch.setattr(jax, "local_device_count", lambda *_, **__: 1)
