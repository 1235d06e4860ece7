"""Several processes on one machine: what one of them does to the others.

A few lines run in each process; `multihost_commands_test` runs the commands.
"""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from tests.support import runs

# Short times: what is tested is what happens when they are over.
START = """
import os, sys, time
import jax, numpy as np
from safetydpo_jax import errors
from safetydpo_jax.runtime import hosts, sharding
hosts.CONNECT_SECONDS, hosts.HEARTBEAT_SECONDS, errors.LEAVE_SECONDS = 30, 5, 2
index = int(os.environ["JAX_PROCESS_ID"])
"""


def start(code, count=2, devices=1, indices=None):
  """Starts `count` processes that run `code`; with `indices` only those of them."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  address = runs.free_address()
  return [
    subprocess.Popen(
      [sys.executable, "-c", START + textwrap.dedent(code)],
      cwd=runs.ROOT,
      env={
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in (range(count) if indices is None else indices)
  ]


def outputs(processes, seconds=120):
  """What each printed; fails if one has not ended by then."""
  end = time.monotonic() + seconds
  try:
    return [
      process.communicate(timeout=max(1, end - time.monotonic()))[0]
      for process in processes
    ]
  finally:
    for process in processes:
      process.kill()


def test_hosts_of_a_permuted_mesh_feed_the_rows_their_devices_hold():
  processes = start(
    """
    hosts.initialize()
    a, b, c, d = jax.devices()
    assert [x.process_index for x in (a, b, c, d)] == [0, 0, 1, 1]
    mesh = jax.sharding.Mesh(np.array([[c], [a], [d], [b]]), ("data", "fsdp"))
    rows = sharding.host_rows(mesh, 8)
    assert list(rows) == [[2, 3, 6, 7], [0, 1, 4, 5]][index], rows
    batch = np.arange(16.0).reshape(8, 2)
    placed = sharding.place_batch(mesh, {"x": batch[rows]})["x"]
    weighted = jax.jit(lambda x: (x * np.arange(16.0).reshape(8, 2)).sum())(placed)
    assert weighted == (batch * batch).sum(), weighted
    hosts.wait_for_all("done")
    """,
    devices=2,
  )
  printed = outputs(processes)
  assert [process.returncode for process in processes] == [0, 0], printed


@pytest.mark.parametrize("failing", [0, 1])
def test_bad_input_on_one_host_ends_the_others(failing):
  processes = start(
    f"""
    def main():
      hosts.initialize()
      if index == {failing}:
        raise errors.InputError("its disk is full; empty it")
      hosts.wait_for_all("all are there")
    errors.run_command(main)
    """
  )
  printed = outputs(processes, seconds=60)
  assert printed[failing].splitlines()[-1] == "error: its disk is full; empty it"
  assert processes[failing].returncode == 1
  assert processes[1 - failing].returncode != 0
  assert "another task died" in printed[1 - failing]


def test_bad_input_on_every_host_is_one_line_on_each():
  processes = start(
    """
    def main():
      hosts.initialize()
      raise errors.InputError("config.steps is 0")
    errors.run_command(main)
    """
  )
  lines = [text.strip().splitlines()[-1] for text in outputs(processes, seconds=60)]
  assert lines == ["error: config.steps is 0"] * 2
  assert [process.returncode for process in processes] == [1, 1]


def test_a_host_that_is_killed_ends_the_others_with_a_word_on_what_to_do():
  processes = start(
    """
    from jax.experimental.multihost_utils import sync_global_devices
    def main():
      hosts.initialize()
      sync_global_devices("a step's all-reduce")
      if index == 1:
        os._exit(9)  # as if killed
      sync_global_devices("the next step's")
    hosts.HEARTBEAT_SECONDS = 60  # what is seen sooner needs no heartbeat
    errors.run_command(main)
    """
  )
  printed = outputs(processes, seconds=90)
  assert [process.returncode for process in processes] == [134, 9]
  assert "Traceback" in printed[0]
  assert "run the same command on every host again" in printed[0]


@pytest.mark.parametrize(
  ("index", "missing"), [(0, "some of the 2 processes"), (1, "the coordinator at")]
)
def test_hosts_that_do_not_come_are_one_line_after_a_while(index, missing):
  code = """
    hosts.CONNECT_SECONDS = 2
    hosts.initialize()
  """
  (process,) = start(code, indices=[index])
  (printed,) = outputs([process], seconds=30)
  assert process.returncode == 1
  line = printed.strip().splitlines()[-1]
  assert line.startswith(f"error: {missing}")
  assert "could not be reached in 2 s" in line


def test_sigterm_on_one_host_stops_all_at_one_step():
  processes = start(
    """
    import signal
    from safetydpo_jax.training import checkpoint
    hosts.initialize(preemption=True)
    with checkpoint.on_preemption() as asked:
      for step in range(1, 2000):
        time.sleep(0.02)
        if step == 5 and index == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        if asked(step):
          print("stopped at", step)
          break
    """
  )
  printed = outputs(processes, seconds=90)
  stops = [text.partition("stopped at")[2].split()[:1] for text in printed]
  assert stops[0] == stops[1] != [], printed
  assert 5 <= int(stops[0][0]) < 1999


def test_sigterm_ends_a_command_that_has_nothing_to_save():
  processes = start(
    """
    import signal
    hosts.initialize()
    if index == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    hosts.wait_for_all("all are there")
    """
  )
  outputs(processes, seconds=60)
  assert processes[1].returncode == -15
  assert processes[0].returncode != 0
