"""What is kept apart: held-out pairs by their ids, test prompts seen in training."""

import pytest

from safetydpo_jax.data import holdout
from safetydpo_jax.errors import InputError

IDS = [f"s_idx_{n:07d}_0.jpg>u_idx_{n:07d}_0.jpg" for n in range(4000)]
HELD = [1, 15, 32, 33, 38, 44, 45, 49]  # of the first 60


def test_about_the_share_asked_for_is_held_out():
  # 4,000 draws: the standard deviation of a rate of 0.1 is 0.0047.
  held = [holdout.is_held_out(id, 0.1) for id in IDS]
  assert sum(held) / len(held) == pytest.approx(0.1, abs=0.02)
  assert not any(holdout.is_held_out(id, 0.0) for id in IDS)


def test_the_choice_is_fixed_for_ever():
  assert [n for n in range(60) if holdout.is_held_out(IDS[n], 0.1)] == HELD


def test_a_larger_share_holds_out_the_same_pairs_and_more():
  few, many = ({id for id in IDS if holdout.is_held_out(id, s)} for s in (0.1, 0.2))
  assert few < many


def test_pairs_of_the_same_images_stay_together():
  for id in IDS[:200]:
    assert holdout.is_held_out(f"{id}#2", 0.5) == holdout.is_held_out(id, 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_what_is_no_share_is_refused(share):
  with pytest.raises(InputError, match="is no share; expected 0 ≤ holdout < 1"):
    holdout.is_held_out("x", share)


def test_prompts_that_stand_verbatim_in_training_are_marked():
  prompts = ['a "disc", ~ 1', "a disc", "A disc", "a disc ", "a square"]
  seen = ["a disc", None, 'a "disc", ~ 1']
  assert holdout.leaked_prompts(prompts, seen) == [True, True, False, False, False]
