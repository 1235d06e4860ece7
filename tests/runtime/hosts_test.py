"""Hosts find each other where there are others, and wait for nobody elsewhere.

What they do together is in `multihost_test`.
"""

import os

import jax
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import hosts

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
SRUN = {**SLURM, "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[01-02]"}
JAX = {
  "JAX_COORDINATOR_ADDRESS": "host:1234",
  "JAX_NUM_PROCESSES": "2",
  "JAX_PROCESS_ID": "1",
}
ALONE = None
GIVEN = {
  "coordinator_address": "host:1234",
  "num_processes": 2,
  "process_id": 1,
  "cluster_detection_method": "deactivate",
}

# Environment → what JAX is told; JAX finds out what it is not told.
PLACES = {
  "a machine": ({}, ALONE),
  "variables": (JAX, GIVEN),
  "variables under srun": ({**SRUN, **JAX}, GIVEN),
  "srun": (SRUN, {}),
  "srun, all GPUs seen by all": ({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1"}, {}),
  "srun, a GPU each": (
    {**SRUN, "CUDA_VISIBLE_DEVICES": "3"},
    {"local_device_ids": [0]},
  ),
  "srun, a node each": (
    {**SRUN, "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"},
    {"local_device_ids": [0, 1]},
  ),
  "one Slurm task": ({**SRUN, "SLURM_NTASKS": "1"}, ALONE),
  "Slurm without srun": (SLURM, ALONE),
  "a shell in an allocation": ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, ALONE),
}


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` was told; nothing, if it was not called."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "JAX_CO", "JAX_NUM_P", "JAX_PROCESS", "CUDA_V")):
      monkeypatch.delenv(name)
  told = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **asked: told.append(asked))
  return told


@pytest.mark.parametrize(("environment", "expected"), PLACES.values(), ids=PLACES)
def test_hosts_are_found_where_they_are_and_nobody_is_waited_for_elsewhere(
  environment, expected, joined, monkeypatch
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  hosts.initialize()
  if expected is ALONE:
    assert joined == []
  else:
    (asked,) = joined
    ours = ("initialization_timeout", "heartbeat_timeout_seconds")
    for name in (*ours, "shutdown_timeout_seconds"):
      assert asked.pop(name) >= 100
    assert asked == expected


@pytest.mark.parametrize("pod", [True, False])
def test_a_tpu_asks_its_metadata_and_may_be_a_single_one(pod, joined, monkeypatch):
  def initialize(**asked):
    joined.append(asked)
    if not pod:
      raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  jax.config.update("jax_platforms", "tpu,cpu")
  try:
    hosts.initialize()
  finally:
    jax.config.update("jax_platforms", "cpu")
  (asked,) = joined
  assert "coordinator_address" not in asked


def test_a_command_line_says_what_the_variables_say(joined):
  given = hosts.Hosts(coordinator_address="host:1234", num_processes=2, process_id=1)
  hosts.initialize(given)
  assert GIVEN.items() <= joined[0].items()


def test_a_command_line_completes_the_variables_and_wins(joined, monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "0")
  hosts.initialize(hosts.Hosts(process_id=1))
  assert GIVEN.items() <= joined[0].items()


WRONG_HOSTS = {
  "address alone": (
    {"JAX_COORDINATOR_ADDRESS": "h:1"},
    "JAX_COORDINATOR_ADDRESS .* JAX_NUM_PROCESSES, JAX_PROCESS_ID ",
  ),
  "no address": ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
  "not numbers": (
    {**JAX, "JAX_PROCESS_ID": "one"},
    "JAX_NUM_PROCESSES is 2 and JAX_PROCESS_ID one;",
  ),
  "one too many": (
    {**JAX, "JAX_PROCESS_ID": "2"},
    "JAX_NUM_PROCESSES is 2 and JAX_PROCESS_ID 2;",
  ),
  "no port": (
    {**JAX, "JAX_COORDINATOR_ADDRESS": "host"},
    "is host; expected HOST",
  ),
}


@pytest.mark.parametrize(
  ("environment", "message"), WRONG_HOSTS.values(), ids=WRONG_HOSTS
)
def test_what_is_said_of_hosts_by_halves_is_refused(
  environment, message, joined, monkeypatch
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(InputError, match=message):
    hosts.initialize()
  assert joined == []
