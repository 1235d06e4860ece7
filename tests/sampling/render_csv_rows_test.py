"""render_csv: an image is its own row's, whatever is rendered beside it."""

import jax
import numpy as np

from tests.support.rendering import HEIGHT, WIDTH, assert_equal_to_rounding, write_csv


def test_an_image_does_not_depend_on_its_batch_its_neighbours_or_the_devices(
  run, tmp_path, monkeypatch
):
  """Batches of 16 on eight devices, then in reverse of 1 on one device, with new noise
  at each step and each row's own guidance and negative prompt."""
  rows = [
    [text, f"{n}.png", n % 11, 1 + n, "on" * (n % 2)]
    for n, text in enumerate(f"an ant {word}" for word in "abcdefghijklmnopq")
  ]
  columns = [
    "prompt",
    "image",
    "evaluation_seed",
    "evaluation_guidance",
    "negative_prompt",
  ]
  there = write_csv(tmp_path / "there.csv", columns, *rows)
  back = write_csv(tmp_path / "back.csv", columns, *rows[:2:-1])
  ancestral = {"sampler": "euler_ancestral"}
  together = run(tmp_path / "together", batch_size=2, prompts=there, **ancestral)
  devices = jax.devices()[3:4]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  alone = run(tmp_path / "alone", batch_size=1, prompts=back, **ancestral)
  assert len(alone) == 14
  assert_equal_to_rounding({name: together[name] for name in alone}, alone)
  assert np.abs(together["0.png"] - together["11.png"]).mean() > 1, "prompts count"


def test_the_noise_of_a_step_is_the_rows_own(run, tmp_path):
  """Euler ancestral from equal initial noise: equal seeds agree, others do not."""
  np.save(tmp_path / "noise.npy", np.ones((3, 4, HEIGHT // 2, WIDTH // 2), np.float32))
  columns, rows = ["prompt", "evaluation_seed"], [["red", 1], ["red", 1], ["red", 2]]
  file = write_csv(tmp_path / "p.csv", columns, *rows)
  more = {"latents": tmp_path / "noise.npy", "sampler": "euler_ancestral"}
  first, same, other = run(tmp_path / "out", prompts=file, **more).values()
  assert np.abs(first - same).max() <= 1
  assert np.abs(first - other).mean() > 5
