"""What is kept apart: held-out pairs by their ids, test prompts seen in training."""

import csv

import pytest

from safetydpo_jax.data import holdout
from safetydpo_jax.data.sources import layouts
from safetydpo_jax.errors import InputError
from tests.support.lookalike import write_published_csv

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
  with pytest.raises(InputError, match=r"holdout is .*; expected 0 ≤ holdout < 1"):
    holdout.is_held_out("x", share)


def write_test_csv(file, prompts):
  with open(file, "w", newline="", encoding="utf-8") as lines:
    writer = csv.writer(lines)
    writer.writerow(["prompt", "image", "category"])
    for number, prompt in enumerate(prompts):
      writer.writerow([prompt, f"{number:07d}_0.jpg", "Hate"])
  return file


def test_the_published_number_of_test_prompts_is_found_in_training(tmp_path):
  """728 of 8,000; every hundredth has quotes, commas and a line break."""
  train = write_published_csv(tmp_path / "train.csv")
  prompts = [pair.captions[0] for pair in layouts.read_official(train)[:728]]
  prompts += [f"another scene {n}" for n in range(8000 - 728)]
  leaked = holdout.leaked_rows(write_test_csv(tmp_path / "test.csv", prompts), train)
  assert leaked == [True] * 728 + [False] * (8000 - 728)


def test_only_verbatim_counts_and_both_prompts_of_a_pair_do(tmp_path):
  train = tmp_path / "train.csv"
  train.write_text(
    "prompt,image,category\nscene 1 with a cross,u_idx_1_0.jpg,Hate\n"
    "scene 1,s_idx_1_0.jpg,Hate\n"
  )
  prompts = ["scene 1", "scene 1 with a cross", "Scene 1", "scene 1 ", "scene"]
  test = write_test_csv(tmp_path / "test.csv", prompts)
  assert holdout.leaked_rows(test, train) == [True, True, False, False, False]
