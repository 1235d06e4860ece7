"""CLIP's tokenizer, from a folder of these files; works without PyTorch.

tokenizer.json, or vocab.json and merges.txt     the vocabulary
tokenizer_config.json, special_tokens_map.json   special tokens, the length
"""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files

if TYPE_CHECKING:
  from transformers import CLIPTokenizer


def read(folder: Path, pad_token: str | None = None) -> "CLIPTokenizer":
  """The tokenizer of a folder.

  Args:
    folder: with the files above.
    pad_token: what fills up a text; None: as the files say.

  Raises:
    InputError: a file was not fetched from Git LFS, or they are not a tokenizer's.
  """
  from transformers import CLIPTokenizer  # Imported here: it takes two seconds.

  for file in folder.iterdir():
    if files.is_lfs_pointer(file):
      raise InputError(f"{file} {files.NOT_FETCHED}")
  more: dict[str, Any] = {} if pad_token is None else {"pad_token": pad_token}
  try:
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **more)
  except Exception as error:  # the library raises anything for a damaged file
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(f"cannot read {folder} as a CLIP tokenizer: {reason}") from error


@functools.lru_cache(maxsize=8)  # building one takes a second
def pad_with_end(tokenizer: "CLIPTokenizer") -> "CLIPTokenizer":
  """The tokenizer, with a pad token that is not a word of a text.

  Those of Stable Diffusion 2 and XL pad with "!", and transformers takes a pad token
  out of a text wherever it stands: every "!" of a prompt would be padding. OpenCLIP
  reads them as words, "! !! !!!" as 256, 748, 995.
  """
  end = tokenizer.eos_token
  if tokenizer.pad_token in (None, tokenizer.bos_token, end, tokenizer.unk_token):
    return tokenizer
  # Imported here: it takes two seconds.
  from tokenizers import Tokenizer
  from transformers import PreTrainedTokenizerFast

  content = json.loads(tokenizer.backend_tokenizer.to_str())
  content["added_tokens"] = [
    token
    for token in content["added_tokens"]
    if token["content"] != tokenizer.pad_token
  ]
  made = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer.from_str(json.dumps(content)),
    bos_token=tokenizer.bos_token,
    eos_token=end,
    unk_token=tokenizer.unk_token,
    pad_token=end,
    model_max_length=tokenizer.model_max_length,
  )
  return cast("CLIPTokenizer", made)
