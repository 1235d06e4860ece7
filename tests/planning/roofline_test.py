"""The roofline, against arithmetic by hand."""

import pytest

from safetydpo_jax.planning import chips, roofline


def test_roofline_by_hand():
  slice_ = chips.read_topology("v5e:2x2")
  found = roofline.estimate(
    slice_,
    flops=197e12 * 0.5,
    moved=819e9 * 0.25,
    collectives={"all-reduce": {"count": 1, "bytes": 100_000_000}},
    pairs=16,
    steps=3600,
  )
  links = 2 * 100e6 * 3 / 4 / 200e9
  assert found["links"] == pytest.approx(links)
  assert found["bound"] == "compute"
  top = found["roofline"]
  assert top["step_seconds"] == pytest.approx(0.5 + links)
  assert top["pairs_per_second"] == pytest.approx(16 / (0.5 + links))
  assert top["run_chip_hours"] == pytest.approx(4 * (0.5 + links))
  assert found["reached"]["step_seconds"] == pytest.approx(0.5 / 0.4 + links)


def test_a_gather_is_among_the_chips_that_share_the_weights():
  slice_ = chips.read_topology("v5e:4x4")
  gathers = {"all-gather": {"count": 1, "bytes": 1e9}}
  found = roofline.estimate(slice_, 1.0, None, gathers, 16, 1, fsdp=4)
  assert found["links"] == pytest.approx(1e9 * 3 / 4 / 200e9)
  assert (found["memory"], found["bound"]) == (None, "links")


def test_float32_has_a_peak_of_its_own():
  tpu, gpu = (chips.read_topology(name) for name in ("v5e:2x2", "gpu:h100x8"))
  for topology, peak in ((tpu, 197e12 / 6), (gpu, 67e12)):
    found = roofline.estimate(topology, peak, 0.0, {}, 16, 1, "float32")
    assert found["compute"] == pytest.approx(1.0)
