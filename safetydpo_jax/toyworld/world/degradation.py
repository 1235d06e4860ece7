"""How often the detector and the reader err, on pictures as a model draws them.

A generated picture differs from a rendered one as equation (3) does: blurred by σ
pixels, contrast lowered to c, every channel shifted by a drift of its own, noise added.

  y = round(128 + c (blur_σ(x) - 128) + drift + noise)                              (3)

Printed as a table by `python -m safetydpo_jax.toyworld.world.degradation`.
"""

from typing import NamedTuple

import numpy as np

from safetydpo_jax.toyworld.world import detector, scenes, symbols


class Level(NamedTuple):
  """One degradation; blur in pixels, drift and noise in grey levels (σ), contrast c."""

  blur: float = 0.0
  contrast: float = 1.0
  drift: float = 0.0
  noise: float = 0.0


# 'autoencoder' is what an autoencoder with factor 4 does to a picture at its worst.
LEVELS = {
  "clean": Level(),
  "light": Level(blur=0.5, contrast=0.95, drift=4, noise=5),
  "autoencoder": Level(blur=0.8, contrast=0.9, drift=8, noise=10),
  "strong": Level(blur=1.2, contrast=0.8, drift=12, noise=20),
  "extreme": Level(blur=1.8, contrast=0.7, drift=16, noise=30),
}


def degrade(images: np.ndarray, level: Level, rng: np.random.Generator) -> np.ndarray:
  """Equation (3): (n, h, w, 3) uint8 → the same."""
  x = detector.blur(images.astype(np.float64), level.blur)
  drift = level.drift * rng.standard_normal((len(x), 1, 1, 3))
  noise = level.noise * rng.standard_normal(x.shape)
  return np.clip(
    np.round(128 + level.contrast * (x - 128) + drift + noise), 0, 255
  ).astype(np.uint8)


def measured_error(seed: int = 0, n: int = 2000) -> dict[str, dict[str, float]]:
  """Error rates on fresh scenes at every level of degradation.

  Args:
    n: pictures with a symbol and as many without.

  Returns:
    {level: {'missed': symbols not found, 'confused': found as another concept,
    'false_alarm': symbols found where there is none, and the share of scenes read wrong
    in each of `detector.ATTRIBUTES`}}, all in 0..1.
  """
  rng = np.random.default_rng(seed)
  drawn = [
    (scenes.sample_scene(rng, ("train", "heldout")[i % 2]), i % len(symbols.CONCEPTS))
    for i in range(n)
  ]
  marked = np.stack([scenes.render(s, symbols.CONCEPTS[k]) for s, k in drawn])
  safe = np.stack([scenes.render(s) for s, _ in drawn])
  truth = np.asarray([k for _, k in drawn])
  errors = {}
  for name, level in LEVELS.items():
    images = degrade(marked, level, rng)
    found = detector.detect_symbols(images).concept
    alarms = detector.detect_symbols(degrade(safe, level, rng)).concept >= 0
    right = detector.attributes_right(
      detector.read_scene(images).scenes, [s for s, _ in drawn]
    )
    errors[name] = {
      "missed": float(np.mean(found < 0)),
      "confused": float(np.mean((found >= 0) & (found != truth))),
      "false_alarm": float(np.mean(alarms)),
      **{attribute: float(1 - np.mean(ok)) for attribute, ok in right.items()},
    }
  return errors


def main() -> None:
  """Prints the table."""
  from tabulate import tabulate  # the world itself needs NumPy alone

  errors = measured_error()
  rows = [[name, *map("{:.2%}".format, of.values())] for name, of in errors.items()]
  print(tabulate(rows, ["level", *errors["clean"]], disable_numparse=True))


if __name__ == "__main__":
  main()
