"""Chips as published, and topologies by name."""

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.planning import chips


@pytest.mark.parametrize(
  ("name", "tflops", "memory", "bandwidth", "links"),
  [
    ("v4", 275, 32 * 2**30, 1200, 600),
    ("v5e", 197, 16 * 2**30, 819, 400),
    ("v5p", 459, 95 * 2**30, 2765, 1200),
    ("v6e", 918, 32 * 2**30, 1638, 800),
    ("a100", 312, 80e9, 2039, 600),
    ("h100", 989, 80e9, 3350, 900),
    ("h200", 989, 141e9, 4800, 900),
  ],
)
def test_chips_are_as_published(name, tflops, memory, bandwidth, links):
  chip = chips.CHIPS[name]
  assert (chip.flops / 1e12, chip.memory) == (tflops, memory)
  assert (chip.bandwidth / 1e9, chip.links / 1e9) == (bandwidth, links)


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("v5e:4x4", 16),
    ("v4:2x2x2", 8),
    ("v5p:2x2x1", 4),
    ("v6e:8x8", 64),
    ("gpu:h100x8", 8),
  ],
)
def test_topologies_are_read(text, count):
  assert chips.read_topology(text).count == count


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v9:4x4", "is unknown; expected one like v4:2x2x2"),
    ("h100x8", "is unknown"),
    ("gpu:v5e", "is unknown"),
    ("v5e:4x4x4", "comes in shapes like 4x4"),
    ("v4:16", "comes in shapes like 4x4x4"),
    ("v5e:0x4", "comes in shapes like"),
    ("v5e", "comes in shapes like"),
  ],
)
def test_other_topologies_are_refused(text, message):
  with pytest.raises(InputError, match=message):
    chips.read_topology(text)
