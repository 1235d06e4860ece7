"""A job of several processes: how they find each other, wait, and end together.

A job is one process on each host (on Slurm one for each task), all running the same
command. They find each other through JAX's coordination service, which ends all of
them when one is gone: after HEARTBEAT_SECONDS at the latest.

Every command line has the flags of `Hosts`; `--help` waits neither for JAX nor for
Orbax, which the functions that need them import.
"""

import dataclasses
import itertools
import os
import re
import sys
import threading
from typing import Any

from safetydpo_jax.errors import InputError

CONNECT_SECONDS = 300  # hosts of a slice come up minutes apart
HEARTBEAT_SECONDS = 100  # a host that is silent for longer is gone
# A host may be hours behind the others, with a slow disk or more to encode; one that is
# gone ends the wait by its heartbeat.
BARRIER_SECONDS = 24 * 3600

_BARRIERS = itertools.count()  # the service takes a barrier's name once


@dataclasses.dataclass(frozen=True)
class Hosts:
  """How the processes of a job find each other.

  On TPU pods and under srun they need none of this. Elsewhere all three are needed, as
  flags or in the environment.
  """

  coordinator_address: str | None = None
  """HOST:PORT of process 0, if there are several (or JAX_COORDINATOR_ADDRESS)"""
  num_processes: int | None = None
  """number of processes (or JAX_NUM_PROCESSES)"""
  process_id: int | None = None
  """number of this process, from 0 (or JAX_PROCESS_ID)"""


def _given_hosts(given: Hosts) -> dict[str, Any] | None:
  """What flags and environment variables say, or None."""
  values = {
    f"JAX_{name.upper()}": os.environ.get(f"JAX_{name.upper()}", "")
    if value is None
    else str(value)
    for name, value in dataclasses.asdict(given).items()
  }
  if not any(values.values()):
    return None
  if not all(values.values()):
    missing = ", ".join(name for name, value in values.items() if not value)
    raise InputError(
      f"{', '.join(name for name in values if values[name])} is set and {missing} is "
      "not; set all three to run several processes, or none to run one"
    )
  names, (address, count, index) = list(values), values.values()
  if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
    raise InputError(
      f"{names[1]} is {count} and {names[2]} {index}; expected whole numbers, the "
      "second below the first"
    )
  if not re.fullmatch(r".+:\d+", address):
    raise InputError(f"{names[0]} is {address}; expected HOST:PORT of process 0")
  return {
    "coordinator_address": address,
    "num_processes": int(count),
    "process_id": int(index),
    "cluster_detection_method": "deactivate",
  }


def _slurm_hosts() -> dict[str, Any] | None:
  """What JAX cannot know of a Slurm step; None if this is not one of several tasks.

  JAX takes the GPU with the task's local number. That is wrong where Slurm shows each
  task its own GPU alone, and wastes the others where a task has a whole node.
  """
  if "SLURM_JOB_ID" not in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) < 2:
    return None
  if "SLURM_STEP_NODELIST" not in os.environ:
    print(
      f"SLURM_NTASKS is {os.environ['SLURM_NTASKS']}, but srun did not start this "
      "process: it runs alone",
      file=sys.stderr,
    )
    return None
  if int(os.environ.get("SLURM_STEP_NUM_TASKS", 2)) < 2:  # a shell of srun's --pty
    return None
  gpus = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
  tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
  if gpus and (len(gpus) == 1 or re.fullmatch(r"1(\(x\d+\))?", tasks)):
    return {"local_device_ids": list(range(len(gpus)))}
  return {}


def initialize(given: Hosts | None = None, *, preemption: bool = False) -> None:
  """Joins the other processes of the job, if there are any.

  `given` or the environment says who they are, or Slurm for the tasks of one srun, or
  the TPU VM's metadata (GCE and GKE, also several slices). Anything else is a single
  process, which waits for no other.

  Args:
    given: what the command line says.
    preemption: keep SIGTERM from ending the process; `checkpoint.on_preemption`
      passes it on to all hosts. Else it ends this process, and so the job.

  Raises:
    InputError: what is given is incomplete.
  """
  import jax

  if jax.distributed.is_initialized():
    return
  found = _given_hosts(given or Hosts())
  if found is None:
    found = _slurm_hosts()
  platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
  if found is None and "tpu" not in platforms.split(","):
    return
  hosts = found or {}
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", preemption)
  who = f"the coordinator at {hosts.get('coordinator_address', 'the first host')}"
  if hosts.get("process_id") == 0:
    who = f"some of the {hosts['num_processes']} processes"
  # JAX's own timeout aborts with a stack trace.
  clock = threading.Timer(CONNECT_SECONDS, _give_up, [who])
  clock.start()
  try:
    jax.distributed.initialize(
      **hosts,
      initialization_timeout=2 * CONNECT_SECONDS,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=BARRIER_SECONDS,  # process 0 writes when others are done
    )
  except ValueError as error:
    if found is not None or "coordinator_address" not in str(error):
      raise
    return  # a TPU and nothing that speaks of other hosts
  finally:
    clock.cancel()
  # The processes exchange their devices with a timeout of minutes: now, while all are
  # here.
  jax.devices()


def _give_up(who: str) -> None:
  print(
    f"error: {who} could not be reached in {CONNECT_SECONDS} s; start the same command "
    "on every host, and let the coordinator's port through the firewall",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def wait_for_all(what: str) -> None:
  """Returns when every host has called it; `what` names in their logs what is awaited.

  Every host calls it at the same places. Uses no device: those may time out.
  """
  import orbax.checkpoint as ocp

  barrier = ocp.multihost.get_barrier_sync_fn()
  key = f"{what} ({next(_BARRIERS)})"
  barrier(key=key, timeout_ms=BARRIER_SECONDS * 1000)
