"""Which weights a figure depends on: file names, SHA-256 sums, published origin."""

import hashlib
import re
from pathlib import Path
from typing import Any

from safetydpo_jax.errors import InputError

# SHA-256 → the published file with it.
PUBLISHED = {
  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": (
    "pytorch-fid, Inception of 2015-12-05"
  ),
  "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": (
    "openai/clip-vit-large-patch14, model.safetensors"
  ),
  "9a78ef8e8c73fd0df621682e7a8e8eb36c6916cb3c16b291a082ecd52ab79cc4": (
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, open_clip_pytorch_model.bin"
  ),
}
# Names that contain a sum: PyTorch's <name>-<first eight digits>.pth, and the blobs
# that the Hugging Face cache links to.
_PROMISES = (re.compile(r"-([0-9a-f]{8})\.pth$"), re.compile(r"^([0-9a-f]{64})$"))


def describe(file: Path) -> dict[str, Any]:
  """{'file': name, 'sha256': sum, 'published': the published file, or None}.

  The folder is left out, as it depends on the machine.

  Raises:
    InputError: the file cannot be read, or its name contains another sum.
  """
  try:
    with file.open("rb") as opened:
      digest = hashlib.file_digest(opened, "sha256").hexdigest()
  except OSError as error:
    raise InputError(f"cannot read {file}: {error.strerror or error}") from error
  for name in {file.name, file.resolve().name}:
    for pattern in _PROMISES:
      promise = pattern.search(name)
      if promise and not digest.startswith(promise[1]):
        raise InputError(
          f"{file} is damaged: its SHA-256 is {digest[:16]}…, but its name says "
          f"{promise[1][:16]}; fetch it again"
        )
  return {
    "file": file.name,
    "sha256": digest,
    "published": PUBLISHED.get(digest),
  }
