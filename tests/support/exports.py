"""Experts to export, and `export` as tests call it."""

import re

from safetydpo_jax import export
from safetydpo_jax.formats.loras import expert


def run(base, folder, name, *more, out=None, model=None, kind="diffusers"):
  """Exports the LoRA `name` for `base`, or another model; returns the folder."""
  out = folder if out is None else out
  options = ["--lora", name, "--model", model or base, "--format", kind, "--out", out]
  export.main([str(option) for option in (*options, *more)])
  return out


def make_expert(folder, tree, fingerprint):
  about = {"base": {"name": "tiny", "fingerprint": fingerprint}}
  expert.write_expert(folder, tree, about)
  return folder


def read_card(out):
  """The model card, without the spaces that pad a table's cells."""
  return re.sub(r" +\|", " |", (out / "README.md").read_text())
