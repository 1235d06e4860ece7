"""What a layer's tensors in a LoRA file add to its kernel, exactly.

In PyTorch's layout, a linear layer having kh = kw = 1, and before the scale alpha / r:

  LoRA    up (o, r), down (r, i[, kh, kw])
  (1)     ΔW = up · down
  LoCon   with mid (r, r, kh, kw), a Tucker core, and down (r, i)
  (2)     ΔW = up · down',   down'_njkl = Σ_m mid_nmkl down_mj
  LoHa    hada_w1_a (o, r), hada_w1_b (r, i·kh·kw), and the same of w2
  (3)     ΔW = (w1_a w1_b) ⊙ (w2_a w2_b)
          with cores t1, t2 (r, r, kh, kw), factors w_a (r, o) and w_b (r, i), each
          product is one of (2) with up = w_aᵀ, mid = t, down = w_b
  LoKr    lokr_w1 (a, c) and lokr_w2 (b, d[, kh, kw]), o = a b and i = c d, each also
          as the product w_a w_b; w2 also as (2) with a core t2
  (4)     ΔW = w1 ⊗ w2
  full    diff: ΔW itself, of any parameter

All are products of two factors, up (o, r') and down (r', i, kh, kw):

  (5)     (3) has r' = r²: up_o,pq = u1_op u2_oq and down_pq = d1_p ⊙ d2_q, Khatri-Rao
          products of the factors
  (6)     (4) has r' = r1 r2: (u1 d1) ⊗ (u2 d2) = (u1 ⊗ u2) (d1 ⊗ d2); a matrix that is
          not given as a product is one with the identity

r, which alpha is divided by, is that of the file's factors. LoKr of two whole matrices
has none, and its alpha does not count.

Sources: LyCORIS (lycoris/modules), A1111 (extensions-builtin/Lora/network_*.py); PEFT
(tuners/loha, tuners/lokr) computes the same.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from safetydpo_jax.errors import InputError

Parts = Mapping[str, np.ndarray]
Shape = tuple[int, ...]  # of ΔW: out, in, kh, kw

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR_1 = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_LOKR_2 = (
  ("lokr_w2",),
  ("lokr_w2_a", "lokr_w2_b"),
  ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
# The parts that make a kind whole.
KINDS = {
  "LoRA": (("down", "up"), ("down", "up", "mid")),
  "LoHa": (_LOHA, (*_LOHA, "hada_t1", "hada_t2")),
  "LoKr": tuple((*one, *two) for one in _LOKR_1 for two in _LOKR_2),
  "full": (("diff",),),
}
# Numbers of a kernel; the largest of a published UNet has 29 million: a convolution
# from 2560 to 1280 channels. A file of a megabyte could ask for terabytes.
_LARGEST = 2**27
# Of all kernels together; SDXL's UNet has 2.6 billion numbers.
LARGEST_UNET = 2**32


def kind_of(parts: Parts, where: str) -> str:
  """Which of `KINDS` a layer's tensors make.

  Raises:
    InputError: they make none; `where` names the layer.
  """
  for kind, wholes in KINDS.items():
    if any(parts.keys() == set(whole) for whole in wholes):
      return kind
  if parts.keys() in ({"down"}, {"up"}):
    raise InputError(f"{where} has only one of its two factors")
  names = ", ".join(sorted(parts))
  raise InputError(
    f"{where} has {f'{names}, which is' if names else 'no factors and is'} not a LoRA, "
    "LoHa, LoKr or full difference; fetch the file again, or save it as a plain LoRA"
  )


def rank_of(parts: Parts) -> int | None:
  """r of the file's factors, None if there are none."""
  for part in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
    if part in parts:
      return parts[part].shape[0]
  return None


def shape_of(parts: Parts, side: int, where: str) -> Shape:
  """The shape of ΔW; every part is checked against the others.

  Args:
    parts: of one of `KINDS`.
    side: of the layer's kernel, which some factors hold flattened: 1 or 3.
    where: names the layer in errors.

  Raises:
    InputError: the parts do not fit each other.
  """
  try:
    shape = _shape(parts, side)
    _need(min(shape) > 0)
  except (ValueError, IndexError):
    shapes = {part: array.shape for part, array in sorted(parts.items())}
    raise InputError(
      f"{where} has parts that do not fit each other: {shapes}; expected one rank, as "
      "in (r, in) and (out, r), or (r, in, kh, kw) and (out, r, 1, 1)"
    ) from None
  if math.prod(shape) > _LARGEST:
    raise InputError(
      f"{where} changes a kernel of shape {shape}, larger than any of a Stable "
      "Diffusion UNet"
    )
  return shape


def _shape(parts: Parts, side: int) -> Shape:
  if "diff" in parts:
    out, inputs, *size = parts["diff"].shape
    return out, inputs, *_size(size)
  if "up" in parts:
    return _pair(parts["up"], parts["down"], parts.get("mid"))
  if "hada_w1_a" in parts:
    one, two = (
      _pair(*_tucker(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}"), side)
      for n in (1, 2)
    )
    _need(one == two)
    return one
  (a, c, *flat), second = _lokr_shapes(parts, side)
  _need(flat == [1, 1])
  return a * second[0], c * second[1], *second[2:]


def _lokr_shapes(parts: Parts, side: int) -> tuple[Shape, Shape]:
  """Shapes of LoKr's two matrices."""
  if "lokr_w1" in parts:
    a, c = parts["lokr_w1"].shape
    first: Shape = (a, c, 1, 1)
  else:
    first = _pair(parts["lokr_w1_a"], parts["lokr_w1_b"])
  if "lokr_w2" in parts:
    b, d, *size = parts["lokr_w2"].shape
    return first, (b, d, *_size(size))
  pair = _tucker(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
  return first, _pair(*pair, side)


def _tucker(
  parts: Parts, first: str, second: str, core: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """up, down and mid of (2) or (1): with a core, up is given transposed."""
  mid = parts.get(core)
  return parts[first] if mid is None else parts[first].T, parts[second], mid


def _pair(
  up: np.ndarray,
  down: np.ndarray,
  mid: np.ndarray | None = None,
  side: int | None = None,
) -> Shape:
  """The shape of a product (1) or (2); `side`: a 2-D `down` is flattened."""
  out, rank, *unit = up.shape
  first, inputs, *size = down.shape
  _need(_size(unit) == (1, 1) and first == rank > 0)
  if mid is not None:
    _need(_size(size) == (1, 1) and mid.shape[:2] == (rank, rank))
    return out, inputs, *_size(mid.shape[2:])
  if side is not None and not size:
    _need(inputs % side**2 == 0)
    return out, inputs // side**2, side, side
  return out, inputs, *_size(size)


def _size(size: Sequence[int]) -> tuple[int, int]:
  """(kh, kw), (1, 1) for a linear layer."""
  height, width = size or (1, 1)
  return height, width


def _need(right: bool) -> None:
  if not right:
    raise ValueError


def inner(parts: Parts) -> int:
  """r' of `factors`, without computing them."""
  if "diff" in parts:
    out, inputs = parts["diff"].shape[0], math.prod(parts["diff"].shape[1:])
    return min(out, inputs)
  if "hada_w1_a" in parts:
    return parts["hada_w1_b"].shape[0] * parts["hada_w2_b"].shape[0]
  if "up" in parts:
    return parts["up"].shape[1]
  first, second = (
    parts[f"lokr_w{n}_b"].shape[0]
    if f"lokr_w{n}" not in parts
    else min(parts[f"lokr_w{n}"].shape[0], math.prod(parts[f"lokr_w{n}"].shape[1:]))
    for n in (1, 2)
  )
  return first * second


def factors(parts: Parts, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  """up (out, r') and down (r', in, kh, kw) with up · down = ΔW, float32.

  Args:
    parts: of one of `KINDS`.
    shape: of ΔW, from `shape_of`.
  """
  out, inputs, *size = shape
  if "up" in parts:
    up, down = _matrices(parts["up"], parts["down"], parts.get("mid"))
  elif "hada_w1_a" in parts:
    (u1, d1), (u2, d2) = _loha_factors(parts)
    up = (u1[:, :, None] * u2[:, None, :]).reshape(out, -1)
    down = (d1[:, None, :] * d2[None, :, :]).reshape(up.shape[1], -1)
  elif "diff" in parts:
    up, down = _with_identity(_flat(parts["diff"]))
  else:
    (u1, d1), (u2, d2) = _lokr_factors(parts)
    up, down = np.kron(u1, u2), np.kron(d1, d2)
  return up, down.reshape(-1, inputs, *size)


def dense(parts: Parts, shape: Shape) -> np.ndarray:
  """ΔW (out, in, kh, kw), float32; see `factors`."""
  if "diff" in parts:
    return np.asarray(parts["diff"], np.float32).reshape(shape)
  if "hada_w1_a" in parts:
    one, two = (np.matmul(*pair) for pair in _loha_factors(parts))
    return (one * two).reshape(shape)
  if "up" in parts:
    return np.matmul(*_matrices(parts["up"], parts["down"], parts.get("mid"))).reshape(
      shape
    )
  first, second = (np.matmul(*pair) for pair in _lokr_factors(parts))
  return np.kron(first, second).reshape(shape)


def _loha_factors(parts: Parts) -> list[tuple[np.ndarray, np.ndarray]]:
  """The two products of (3): (u1, d1), (u2, d2)."""
  return [
    _matrices(*_tucker(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}"))
    for n in (1, 2)
  ]


def _lokr_factors(parts: Parts) -> list[tuple[np.ndarray, np.ndarray]]:
  """The two matrices of (4) as products: (u1, d1), (u2, d2)."""
  pairs = []
  for n in (1, 2):
    if (whole := parts.get(f"lokr_w{n}")) is not None:
      pairs.append(_with_identity(_flat(whole)))
    else:
      pair = _tucker(parts, f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}")
      pairs.append(_matrices(*pair))
  return pairs


def _with_identity(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A matrix as a product with the identity on its shorter side."""
  rows, columns = matrix.shape
  if rows < columns:
    return np.eye(rows, dtype=np.float32), matrix
  return matrix, np.eye(columns, dtype=np.float32)


def _matrices(
  up: np.ndarray, down: np.ndarray, mid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """up (o, r) and down (r, i·kh·kw) of (1), or of (2)."""
  up, down = _flat(up), _flat(down)
  if mid is not None:
    down = np.einsum("nmkl,mj->njkl", np.asarray(mid, np.float32), down)
  return up, down.reshape(up.shape[1], -1)


def _flat(array: np.ndarray) -> np.ndarray:
  """(first axis, all others) in float32."""
  return np.asarray(array, np.float32).reshape(len(array), -1)
