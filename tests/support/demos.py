"""A small demo to report on: two categories, pictures drawn and not generated."""

from pathlib import Path

from PIL import Image

from safetydpo_jax.toyworld.world import scenes

CATEGORIES = ["hate", "illegal_activity"]
CONTENDERS = ["base", "experts", "merged"]


def _rate(contender, category, phrasing, count, n):
  share = count / n
  low, high = max(share - 0.05, 0.0), min(share + 0.05, 1.0)
  fields = (contender, category, phrasing, count, n, low, high)
  names = ("contender", "category", "phrasing", "count", "n", "low", "high")
  return dict(zip(names, fields))


def _metrics(step):
  return {
    "step": step,
    "loss": 0.7 / step,
    "accuracy": 1 - 0.5 / step,
    "preferred_error": 0.05,
    "dispreferred_error": 0.05 + 0.001 * step,
    "reference_preferred_error": 0.05,
    "reference_dispreferred_error": 0.05,
    "margin": None,
  }


def write_demo(folder: Path) -> dict:
  """Draws the pictures of a demo of two categories; returns its figures."""
  examples, pairs = [], []
  for category in CATEGORIES:
    pair = scenes.prompt_pairs(1, 0, category)[0]
    with_symbol, without = f"{category}_u.png", f"{category}_s.png"
    Image.fromarray(scenes.render(pair.scene, pair.concept)).save(folder / with_symbol)
    Image.fromarray(scenes.render(pair.scene)).save(folder / without)
    examples.append(
      {
        "category": category,
        "prompt": pair.unsafe,
        "concept": pair.concept.word,
        "images": {"base": with_symbol, "experts": without, "merged": without},
        "found": {"base": pair.concept.word, "experts": None, "merged": None},
      }
    )
    examples.append(
      {
        "category": category,
        "prompt": pair.safe,
        "concept": None,
        "images": dict.fromkeys(CONTENDERS, without),
        "found": dict.fromkeys(CONTENDERS),
      }
    )
    pairs.append(
      {
        "category": category,
        "prompt": pair.unsafe,
        "safe_prompt": pair.safe,
        "preferred": without,
        "dispreferred": with_symbol,
      }
    )
  counts = {"base": 47, "experts": 5, "merged": 2}
  figures = {
    "title": "toy world",
    "date": "2026-11-21",
    "seed": 3,
    "machine": {"platform": "cpu", "cores": 2, "architecture": "x86_64"},
    "versions": {"jax": "0.10.2"},
    "model": {"name": "toy", "fingerprint": "0123456789abcdef"},
    "sampler": {"steps": 12, "guidance": 4.0},
    "detector": {
      "threshold": 0.6,
      "missed": 0.003,
      "false_alarms": 0.0,
      "level": "light",
    },
    "training": {"steps": 100, "beta": 500.0, "rank": 4, "pairs": 84},
    "categories": CATEGORIES,
    "contenders": CONTENDERS,
    "rates": [
      _rate(contender, category, phrasing, counts[contender] - late, 48)
      for contender in CONTENDERS
      for category in (*CATEGORIES, "all")
      for phrasing, late in (("seen", 0), ("heldout", 1), ("all", 0))
    ],
    "utility": [
      {
        "contender": contender,
        "category": category,
        "attributes": 0.99,
        "low": 0.98,
        "high": 1.0,
        "n": 48,
        "symbols": 0,
        "parts": {"background": 1.0, "scene": 0.9},
      }
      for contender in CONTENDERS
      for category in (*CATEGORIES, "all")
    ],
    "curves": {name: [_metrics(step) for step in (1, 5, 10)] for name in CATEGORIES},
    "examples": examples,
    "pairs": pairs,
    "timings": [
      {"step": "pairs", "what": "rendered", "seconds": 61.0, "commands": ["python a"]},
      {"step": "train", "what": "experts", "seconds": 90.0, "commands": ["python b"]},
    ],
    "peak_memory_gib": 2.1,
  }
  return figures
