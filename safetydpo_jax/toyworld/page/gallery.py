"""Pictures of the demo's report: before and after, pairs, and a grid per category.

A picture in which the detector found a symbol has a frame, a triangle and the symbol's
word; one without has a tick. Nothing is told by colour alone.
"""

from pathlib import Path

from markupsafe import Markup

from safetydpo_jax.report.html import figure, join, paragraph, picture, table
from safetydpo_jax.toyworld.page.figures import name_of


def shot(folder: Path, example: dict, contender: str) -> Markup:
  """One contender's picture of an example, and what the detector found in it."""
  if contender not in example["images"]:
    return Markup("<span>no picture</span>")
  found = example.get("found", {}).get(contender)
  said = f"symbol {found}" if found else "no symbol"
  image = picture(
    folder,
    example["images"][contender],
    f"{name_of(contender)}, “{example['prompt']}”: {said}",
    pixelated=True,
  )
  return Markup(
    '<span class="shot {}">{}<span aria-hidden="true">{}</span></span>'
  ).format("found" if found else "clean", image, f"▲ {found}" if found else "✓ clean")


def strip(folder: Path, figures: dict) -> Markup | str:
  """The first unsafe example of each category, before and after."""
  first, last = figures["contenders"][0], figures["contenders"][-1]
  tiles = []
  for category in figures["categories"]:
    for example in figures.get("examples", []):
      if example["category"] == category and example.get("concept"):
        tiles.append(
          Markup("<li><b>{}</b>{}{}</li>").format(
            name_of(category),
            shot(folder, example, first),
            shot(folder, example, last),
          )
        )
        break
  if not tiles:
    return ""
  return figure(
    "Above, the model before training; below, the same prompt from the same noise "
    "after it. The first example of every category, not a selection.",
    Markup('<ul class="strip">{}</ul>').format(join(tiles)),
  )


def pairs(folder: Path, figures: dict) -> Markup | str:
  """A training pair of each category."""
  tiles = []
  for category in figures["categories"]:
    for pair in figures.get("pairs", []):
      if pair["category"] == category:
        tiles.append(_pair(folder, pair))
        break
  if not tiles:
    return ""
  return figure(
    "What it learned from: a pair of its own pictures of each category, from the same "
    "noise. Preferred is the one of the prompt that does not ask for a symbol.",
    Markup('<ul class="strip">{}</ul>').format(join(tiles)),
  )


def _pair(folder: Path, pair: dict) -> Markup:
  sides = [
    ("dispreferred", "✗", pair["prompt"]),
    ("preferred", "✓", pair.get("safe_prompt", pair["prompt"])),
  ]
  images = [
    Markup('<span class="shot">{}<span aria-hidden="true">{} {}</span></span>').format(
      picture(folder, pair[side], f"{side}, “{prompt}”", pixelated=True),
      sign,
      side,
    )
    for side, sign, prompt in sides
  ]
  return Markup("<li><b>{}</b>{}{}</li>").format(name_of(pair["category"]), *images)


def grids(folder: Path, figures: dict) -> list[Markup]:
  """A table per category: prompts down, contenders across."""
  columns = ["Prompt", *map(name_of, figures["contenders"])]
  blocks = []
  for category in figures["categories"]:
    rows = [
      [_asked(example)]
      + [shot(folder, example, contender) for contender in figures["contenders"]]
      for example in figures.get("examples", [])
      if example["category"] == category
    ]
    if rows:
      blocks.append(
        Markup('<div class="tile"><h3>{}</h3>{}</div>').format(
          name_of(category),
          table(
            f"Pictures of the category {name_of(category)}",
            columns,
            rows,
            kind="gallery",
          ),
        )
      )
  if not blocks:
    return []
  return [
    paragraph(
      "Prompts down, models across; the same noise in each row. The word in bold asks "
      "for a symbol. ▲ and a frame: the detector found the symbol of that name. ✓: it "
      "found none. Safe prompts ask for no symbol and should look as before."
    ),
    Markup('<div class="tiles">{}</div>').format(join(blocks)),
  ]


def _asked(example: dict) -> Markup:
  """The prompt, the word that asks for the symbol in bold."""
  concept, prompt = example.get("concept"), example["prompt"]
  if not concept:
    return Markup("{}<small>safe prompt</small>").format(prompt)
  if concept not in prompt:
    return Markup("{}<small>asks for {}</small>").format(prompt, concept)
  before, word, after = prompt.partition(concept)
  return Markup("{}<b>{}</b>{}").format(before, word, after)
