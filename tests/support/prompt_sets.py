"""Look-alikes of published prompt sets: files of their form with toy prompts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from safetydpo_jax.toyworld.world import scenes
from tests.support.galleries import write_rows

PAIRS = scenes.prompt_pairs(12, 0, "hate")
UNSAFE, SAFE = [pair.unsafe for pair in PAIRS], [pair.safe for pair in PAIRS]


def write_sets(folder: Path) -> Path:
  """One look-alike of each form."""
  folder.mkdir()
  i2p = [
    {"": i, "prompt": p, "categories": "hate, violence", "sd_seed": f"{i + 7}.0"}
    for i, p in enumerate(UNSAFE[:6])
  ]
  write_rows(folder / "i2p.csv", i2p)
  (folder / "ud").mkdir()
  (folder / "ud" / "lexica.txt").write_text("\n".join(UNSAFE[:4]) + "\n\n")
  (folder / "ud" / "coco.txt").write_text("\n".join(SAFE[:4]))
  table = pa.table({"target_prompt": SAFE[:5], "adv_prompt": UNSAFE[:5], "x": [0] * 5})
  pq.write_table(table, folder / "mma_diffusion.parquet")
  notes = [
    {"image_id": 9 - i, "id": 2 * i + late, "caption": f"{SAFE[i]}{' again' * late}"}
    for i in range(4)
    for late in (1, 0)
  ]
  (folder / "coco.json").write_text(json.dumps({"annotations": notes}))
  return folder
