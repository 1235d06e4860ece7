"""Expert directories: a LoRA as an Orbax tree, and expert.json, which describes it.

  RUN/lora/          Orbax: {module path: {'a': (in, r), 'b': (r, out)}}, float32, the
                     scale alpha / r folded into b
  RUN/expert.json    category, rank, alpha, targets, base (name, fingerprint), step,
                     seed, config, versions; written last

A merged LoRA has the same form. Fingerprints, not names, decide whether a LoRA fits a
model: two folders may hold the same weights.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from safetydpo_jax.errors import InputError
from safetydpo_jax.lora import LoraTree, Tree
from safetydpo_jax.runtime import manifest

MANIFEST = "expert.json"


def write_expert(folder: Path, lora: Tree, about: dict[str, Any]) -> None:
  """Writes the tree with every host, then the manifest with process 0.

  Args:
    folder: the expert's directory.
    lora: the LoRA tree, scale folded in, replicated on all devices.
    about: what expert.json says, besides versions.

  Raises:
    InputError: the folder cannot be written.
  """
  folder = Path(folder).absolute()
  if jax.process_index() == 0:
    try:
      folder.mkdir(parents=True, exist_ok=True)  # Orbax would wait for it for minutes
      (folder / MANIFEST).unlink(missing_ok=True)  # it describes the previous LoRA
    except OSError as error:
      raise InputError(f"cannot write to {folder}: {error.strerror}") from error
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "lora", lora, force=True)
  if jax.process_index() == 0:
    about = {**about, "versions": manifest.versions()}
    manifest.write_json(folder / MANIFEST, about)


def read_expert(folder: Path) -> tuple[LoraTree, dict[str, Any]]:
  """The LoRA tree as numpy arrays, and what expert.json says.

  Raises:
    InputError: the folder holds no finished expert, or a damaged one.
  """
  folder = Path(folder).absolute()
  about = manifest.read_json(folder / MANIFEST, "finished expert")
  base = about.get("base") if isinstance(about, dict) else None
  if not isinstance(base, dict) or not {"name", "fingerprint"} <= base.keys():
    raise InputError(
      f"{folder / MANIFEST} does not say which model the LoRA was trained on; expected "
      "base.name and base.fingerprint"
    )
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.metadata(folder / "lora").item_metadata.tree
      like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
      return LoraTree(checkpointer.restore(folder / "lora", like)), about
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise InputError(f"{folder / 'lora'} is not a readable LoRA: {error}") from error
