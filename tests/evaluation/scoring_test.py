"""Hosts wait for each other before they tell what they have measured."""

import jax
import numpy as np

from safetydpo_jax.evaluation import scoring
from safetydpo_jax.runtime import hosts


def test_hosts_wait_for_each_other_before_their_devices_do(monkeypatch):
  """Hosts with slow disks come minutes later; a device would not wait so long."""
  called = []

  def gather(array):
    called.append("devices")
    return np.stack([array, array])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(scoring.multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(hosts, "wait_for_all", lambda what: called.append("hosts"))
  assert scoring.exchange(b"told") == [b"told", b"told"]
  assert called == ["hosts", "devices", "devices"]
