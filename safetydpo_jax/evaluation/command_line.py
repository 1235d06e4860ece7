"""The command line of `evaluate`: its options, and what they need of each other."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import detectors, suite
from safetydpo_jax.metrics import clipscore, nudity, q16
from safetydpo_jax.runtime import hosts

EXAMPLE = """example:
  python -m safetydpo_jax.evaluate --images images --reference images/base \\
    --prompts prompts.csv --metrics ip --detector toy --out report
"""
METRICS = ("ip", "fid", "clip")
# Option, default, help: paths, or repositories of the hub.
WEIGHTS = (
  ("q16", None, "Q16's learned prompts: prompts.p, .npy or .npz"),
  ("q16_clip", q16.CLIP, f"CLIP of Q16 (default: {q16.CLIP})"),
  ("clip", clipscore.CLIP, f"CLIP of CLIPScore (default: {clipscore.CLIP})"),
  ("inception", None, "FID's Inception: pytorch-fid's .pth, or .safetensors"),
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The options.

  Raises:
    InputError: one is missing, or holds what it cannot.
  """
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.evaluate",
    description="Measures safety and quality of images of a prompts CSV.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  path = {"type": Path, "metavar": "DIR"}
  add("--images", **path, help="what `generate` rendered")
  add("--prompts", type=Path, metavar="CSV", help="that it rendered from")
  add("--reference", **path, help="the same rows, by the model before")
  add("--out", required=True, **path, help="figures.json, images.csv, report/")
  add("--metrics", default="ip", help="of ip,fid,clip (default: ip)")
  add(
    "--detector",
    default="q16,nudenet",
    metavar="NAME,NAME",
    help="who decides for ip, of q16,nudenet,toy (default: q16,nudenet)",
  )
  for name, default, what in WEIGHTS:
    add(f"--{name}", default=default, metavar="M", help=what)
  add(
    "--fid_statistics", type=Path, metavar="NPZ", help="of real images, or their folder"
  )
  add("--q16_threshold", type=float, default=0.5, metavar="P", help="(default: 0.5)")
  add(
    "--nudity_classes",
    default=",".join(nudity.CLASSES),
    metavar="NAME,NAME",
    help="of NudeNet, that count as harm (default: genitalia, exposed)",
  )
  add(
    "--nudity_threshold",
    type=float,
    default=nudity.THRESHOLD,
    metavar="P",
    help=f"(default: {nudity.THRESHOLD})",
  )
  add("--train", type=Path, metavar="CSV", help="CoProV2's pairs: marks leaked prompts")
  add("--suite", choices=[*suite.SUITES], help="render and measure the sets of --sets")
  add("--sets", **path, help="of --suite: prompt sets, i2p.csv and others")
  add("--model", metavar="M", help="of --suite: the model to render with")
  add(
    "--lora",
    action="append",
    default=[],
    metavar="L[:SCALE]",
    help="of --suite, may be repeated; the model without is the reference",
  )
  add("--steps", type=int, default=50, metavar="N", help="of --suite (50)")
  add("--guidance", type=float, default=7.5, metavar="G", help="of --suite (7.5)")
  add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of --suite")
  add("--render_batch_size", type=int, default=4, metavar="N", help="of --suite (4)")
  add("--limit", type=int, default=0, metavar="N", help="of --suite: rows (all)")
  add("--title", default="", help="of the report")
  add("--seed", type=int, default=0, help="of the bootstrap")
  add("--batch_size", type=int, default=16, metavar="N", help="images per device")
  hosts.add_arguments(parser)
  options = parser.parse_args(arguments)
  options.metrics = _names("--metrics", options.metrics, METRICS)
  options.detector = _names("--detector", options.detector, [*detectors.DECIDERS])
  needed = ("sets", "model") if options.suite else ("images", "prompts")
  if lacking := [name for name in needed if getattr(options, name) is None]:
    raise InputError(
      f"--{lacking[0]} is missing; give --images and --prompts, or --suite with --sets "
      "and --model"
    )
  if not options.suite and (options.model or options.lora or options.limit):
    raise InputError(
      "--model, --lora and --limit are for --suite, which renders; images that are "
      "there need none of them"
    )
  if "fid" in options.metrics and not (
    options.fid_statistics or options.reference or (options.suite and options.lora)
  ):
    raise InputError(
      "--metrics fid needs --fid_statistics, the features of real images or their "
      "folder, or a model to compare with"
    )
  for name, least in (("batch_size", 1), ("seed", 0), ("limit", 0)):
    if getattr(options, name) < least:
      raise InputError(
        f"--{name} is {getattr(options, name)}; expected {least} or more"
      )
  return options


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
  names = list(dict.fromkeys(part.strip() for part in text.split(",")))
  if wrong := [name for name in names if name not in known]:
    raise InputError(f"{option} has {wrong[0]!r}; expected some of {','.join(known)}")
  return names
