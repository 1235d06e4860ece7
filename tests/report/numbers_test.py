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


def test_settings_are_one_line():
  settings = {"a_b": [1, None], "c": {"d": "e f"}}
  assert numbers.words(settings) == "a b 1 + –, c d e f"


@pytest.mark.parametrize(
  ("share", "text"), [(0.25, "25 %"), (0.001, "0.1 %"), (0.999, "99.9 %"), (1, "100 %")]
)
def test_a_share_that_is_not_zero_or_one_is_not_rounded_to_it(share, text):
  assert numbers.rounded(share).replace("\u00a0", " ") == text


def test_a_minus_sign_is_as_long_as_a_plus():
  assert (numbers.points(-0.8), numbers.signed(0.25, 2)) == ("−80.0", "+0.25")
