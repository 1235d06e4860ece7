"""`render_csv` on the tiny checkpoint."""

import jax
import pytest

from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv
from tests.support.rendering import (
  GUIDANCE,
  HEIGHT,
  PROMPTS,
  STEPS,
  WIDTH,
  read_images,
  write_csv,
)


@pytest.fixture(scope="module")
def prompts_csv(tmp_path_factory):
  file = tmp_path_factory.mktemp("prompts") / "prompts.csv"
  return write_csv(file, ["prompt"], *([text] for text in PROMPTS))


@pytest.fixture(scope="module")
def run(tiny_checkpoint, prompts_csv):
  """`render_csv` on the tiny checkpoint; the folder as {name: (H, W, 3) int}."""

  def run(out, **changes):
    options = {
      "model": str(tiny_checkpoint),
      "prompts": prompts_csv,
      "out": out,
      "steps": STEPS,
      "height": HEIGHT,
      "width": WIDTH,
      "guidance": GUIDANCE,
    }
    count = render_csv(RenderOptions(**(options | changes)))
    found = read_images(out)
    if jax.process_count() == 1:
      assert count == len(found) * (2 if changes.get("compare") else 1)
    return found

  return run
