"""The search for the largest batch, with compilations that are made up."""

import pytest

from safetydpo_jax.planning import chips, measure
from tests.support.configs import run_config


@pytest.mark.parametrize(
  ("used", "most", "compilations"),
  [
    (lambda pairs: 4 + pairs, 12, 4),  # affine: two, the answer, one more
    (lambda pairs: 4 + 0.5 * pairs + 0.021 * pairs**2, 14, 7),
    (lambda pairs: 4 + max(0, pairs - 100), 112, 11),  # the first two alike
    (lambda pairs: 15 + pairs, 1, 2),
    (lambda pairs: 16 + pairs, 0, 1),
  ],
)
def test_the_largest_batch_is_found_and_not_looked_for_at_the_end_of_the_world(
  used, most, compilations, monkeypatch
):
  """As memory in GiB by pairs, of 16: no program of billions of rows is compiled."""
  slice_, tried = chips.read_topology("v5e:2x2"), []

  def compile_step(config, topology, devices):
    pairs = config.batch_size // topology.count
    tried.append(pairs)
    total = used(pairs) * chips.GIB
    return {"fits": total <= topology.chip.memory, "memory": {"total": total}}

  monkeypatch.setattr(measure, "compile_step", compile_step)
  found, _ = measure.largest_batch(run_config(), slice_, [])
  assert found == most
  assert len(tried) <= compilations
  assert max(tried) <= 8 * max(most, 1)
