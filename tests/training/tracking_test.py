"""metrics.jsonl reads as one uninterrupted run, by any JSON reader."""

import json

import jax
import jax.numpy as jnp
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.training import tracking


def track(workdir, steps, start=0, log_every=1, **scalars):
  with tracking.Tracker(workdir, start, 10, 16, log_every) as tracker:
    for step in steps:
      tracker.log(step, {"loss": 0.5 * step, **scalars})


def read(workdir):
  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def test_one_line_for_each_step(tmp_path):
  track(tmp_path, [1, 2], margin=0.25)
  assert read(tmp_path) == [
    {"step": 1, "loss": 0.5, "margin": 0.25},
    {"step": 2, "loss": 1.0, "margin": 0.25},
  ]
  assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_line_is_the_mean_since_the_line_before(tmp_path):
  track(tmp_path, range(1, 11), log_every=4)
  assert read(tmp_path) == [
    {"step": 1, "loss": 0.5},
    {"step": 4, "loss": 1.5},  # of 1.0, 1.5, 2.0
    {"step": 8, "loss": 3.25},
    {"step": 10, "loss": 4.75},
  ]


def test_accuracy_by_timestep_weighs_pairs_and_not_steps(tmp_path):
  with tracking.Tracker(tmp_path, 1, 10, 16, 3) as tracker:
    for step, share, correct in ((2, 0.25, 0.25), (3, 0.75, 0.0)):
      arrays = {"share_by_timestep": [share], "correct_by_timestep": [correct]}
      tracker.log(step, {"loss": 0.5, **arrays})
  assert read(tmp_path)[0]["accuracy_timestep_quarter_1"] == 0.25


def test_lines_are_there_before_the_run_ends(tmp_path):
  with tracking.Tracker(tmp_path, 0, 10, 16, 1) as tracker:
    tracker.log(1, {"loss": 1.0})
    assert len(read(tmp_path)) == 1


def test_a_resumed_run_drops_the_steps_it_will_do_again(tmp_path):
  track(tmp_path, [1, 2, 3, 4, 5])
  track(tmp_path, [4, 5, 6], start=3, again=1)
  assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert ["again" in line for line in read(tmp_path)] == [False] * 3 + [True] * 3


def test_a_run_that_starts_over_starts_an_empty_file(tmp_path):
  """Killed before its first checkpoint."""
  track(tmp_path, [1, 2, 3])
  track(tmp_path, [1], start=0)
  assert [line["step"] for line in read(tmp_path)] == [1]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "\x00\x00", "7", "{}"])
def test_a_last_line_cut_short_is_dropped(rest, tmp_path):
  track(tmp_path, [1, 2])
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write(rest)
  track(tmp_path, [4], start=3)
  assert [line["step"] for line in read(tmp_path)] == [1, 2, 4]


def test_bytes_that_are_no_text_are_dropped(tmp_path):
  track(tmp_path, [1, 2])
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write(b"\xff\xfe")
  track(tmp_path, [3], start=2)
  assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_null(value, tmp_path):
  track(tmp_path, [1], gradient_norm=value)
  assert read(tmp_path)[0] == {"step": 1, "loss": 0.5, "gradient_norm": None}


def test_scalars_of_the_devices_become_floats():
  scalars = tracking.to_scalars({"loss": jnp.float32(0.5), "lora_norm": jnp.int32(2)})
  assert scalars == {"loss": 0.5, "lora_norm": 2.0}
  assert all(type(value) is float for value in scalars.values())


def test_accuracy_by_timestep_leaves_out_quarters_that_drew_no_pair():
  metrics = {
    "loss": jnp.float32(0.5),
    "share_by_timestep": jnp.array([0.5, 0.0, 0.25, 0.25]),
    "correct_by_timestep": jnp.array([0.375, 0.0, 0.0, 0.25]),
  }
  assert tracking.to_scalars(metrics) == {
    "loss": 0.5,
    "accuracy_timestep_quarter_1": 0.75,
    "accuracy_timestep_quarter_3": 0.0,
    "accuracy_timestep_quarter_4": 1.0,
  }


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  track(tmp_path, [1, 2])
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named():
  with pytest.raises(InputError, match=r"cannot write /proc/metrics\.jsonl"):
    tracking.Tracker("/proc", 0, 10, 16, 1)
