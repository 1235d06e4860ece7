"""Every tensor of a single file is used, or is in this table of what is left out."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import single_file_families as families

_TEXT = r"(cond_stage_model|conditioner\.embedders\.\d)\."
TEXT_REST = ("text projections", "last layer of OpenCLIP")
_LEFT_OUT = (
  (r"model_ema\.", "EMA weights"),
  (
    r"(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w*alphas_cumprod|posterior_\w+|logvar"
    r"|scale_factor)$|denoiser\.(sigmas|log_sigmas)$",
    "noise schedule",
  ),
  (r"(global_step|epoch|lr|num_batches)$", "training state"),
  (r"((first_stage_model|vae)\.)?(loss|model_ema)\.", "VAE training state"),
  (r"(.*\.)?position_ids$", "position ids"),
  (
    _TEXT + r"(transformer\.|model\.)?(text_model\.)?"
    r"(logit_scale|text_projection(\.weight)?|attn_mask)$",
    TEXT_REST[0],
  ),
  # SD 2 conditions on the state before the last of OpenCLIP's layers.
  (
    rf"{_TEXT}model\.transformer\.resblocks\.{families.SD2.encoders[0].layers}\.",
    TEXT_REST[1],
  ),
  (rf"({'|'.join(families.MARKERS)})$", "markers"),
)


def why_left_out(name: str) -> str | None:
  """What a tensor is that no network here uses, None if it is not known."""
  return next((what for pattern, what in _LEFT_OUT if re.match(pattern, name)), None)


def account(
  tensors: Mapping[str, np.ndarray], used: Iterable[str]
) -> dict[str, np.ndarray]:
  """The tensors that are left out.

  Args:
    tensors: the file's.
    used: the keys that the networks' parameters need.

  Raises:
    InputError: a parameter has no tensor, or a tensor has no use and is not known.
  """
  used = set(used)
  left_out = {name: x for name, x in tensors.items() if name not in used}
  missing = sorted(used - tensors.keys())
  unknown = sorted(name for name in left_out if not why_left_out(name))
  complaints = [
    f"{what} {len(names):,} tensors ({', '.join(name[:80] for name in names[:3])}"
    f"{', …' if len(names) > 3 else ''})"
    for what, names in (("lacks", missing), ("has no place in the model for", unknown))
    if names
  ]
  if complaints:
    raise InputError(
      f"it {', and '.join(complaints)}; fetch it again, or convert it with the tool it "
      "came from"
    )
  if "ztsnr" in left_out and "v_pred" not in left_out:
    raise InputError(
      "it has the marker ztsnr and not v_pred: noise prediction cannot start without "
      "signal; fetch it again"
    )
  return left_out
