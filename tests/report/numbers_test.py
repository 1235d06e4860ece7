"""Numbers of a report are written as people say them."""

import pytest

from safetydpo_jax.report import numbers


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.04, "0.0 s"),
    (9.94, "9.9 s"),
    (9.96, "10 s"),
    (59.6, "1 min"),
    (75.2, "1 min 15 s"),
    (3600, "1 h"),
    (3725, "1 h 2 min"),
    (0, "0.0 s"),
  ],
)
def test_durations_read_as_people_say_them(seconds, text):
  assert numbers.duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("share", "text"), [(0.9792, "97.9 %"), (0, "0.0 %")])
def test_shares_are_percent(share, text):
  assert numbers.percent(share).replace("\u00a0", " ") == text
