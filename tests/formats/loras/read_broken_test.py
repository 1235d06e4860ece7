"""LoRA files that are damaged, hostile or something else: one line that names them."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from safetydpo_jax import load_lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import products
from safetydpo_jax.formats.loras.load import load_adapter

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
A, B = np.ones((3, 8), np.float32), np.ones((8, 3), np.float32)
BROKEN = {
  "no LoRA": ({"unet.conv_in.weight": A}, r"'unet\.conv_in\.weight' is not"),
  "no UNet's": ({"unet.blocks.0.lora.down.weight": A}, r"'unet\.blocks\.0\..*' is not"),
  "a path": ({"unet.../../x.lora.down.weight": A}, r"'unet\.\.\./\.\./x\..*' is not"),
  "no module": (
    {f"{FLAT}_x.lora_down.weight": A},
    rf"'{FLAT}_x\.lora_down\..*' is not",
  ),
  "one factor": ({f"{LAYER}.lora.down.weight": A}, r"attn1\.to_q has only one"),
  "twice": (
    {f"{LAYER}.lora.down.weight": A, f"{LAYER}.lora_A.weight": A},
    rf"'{LAYER}\.lora_A\.weight' is listed twice",
  ),
  "ranks": (
    {f"{LAYER}.lora.down.weight": A, f"{LAYER}.lora.up.weight": np.ones((8, 2))},
    r"'down': \(3, 8\), 'up': \(8, 2\)",
  ),
  "no rank": (
    {f"{LAYER}.lora.down.weight": A[:0], f"{LAYER}.lora.up.weight": B[:, :0]},
    r"'down': \(0, 8\), 'up': \(8, 0\)",
  ),
  "a wide up": (
    {
      f"{FLAT}.lora_down.weight": np.ones((3, 8, 3, 3)),
      f"{FLAT}.lora_up.weight": np.ones((8, 3, 3, 3)),
    },
    r"'down': \(3, 8, 3, 3\), 'up': \(8, 3, 3, 3\)",
  ),
  "alphas": (
    {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B, f"{FLAT}.alpha": A},
    r"alpha of shape \(3, 8\)",
  ),
  "NaN": (
    {f"{LAYER}.lora.down.weight": A * np.nan, f"{LAYER}.lora.up.weight": B},
    r"attn1\.to_q holds NaN",
  ),
  "alpha NaN": (
    {
      f"{FLAT}.lora_down.weight": A,
      f"{FLAT}.lora_up.weight": B,
      f"{FLAT}.alpha": np.array(np.nan),
    },
    r"attn1\.to_q holds NaN",
  ),
  "OFT": ({f"{FLAT}.oft_blocks": A}, "is OFT .*expected a LoRA, LoHa"),
  "half a LoHa": ({f"{FLAT}.hada_w1_a": A}, "to_q has hada_w1_a,"),
  "half a LoKr": ({f"{FLAT}.lokr_w1": A}, "to_q has lokr_w1,"),
  "a core alone": ({f"{FLAT}.lora_mid.weight": A}, "to_q has mid,"),
  "magnitudes alone": ({f"{FLAT}.dora_scale": A}, "to_q has no factors"),
  "magnitudes of a norm": (
    {
      f"{FLAT}.lora_down.weight": A,
      f"{FLAT}.lora_up.weight": B,
      f"{FLAT}.dora_scale": A,
    },
    r"dora_scale of shape \(3, 8\)",
  ),
  "magnitudes of PEFT": (
    {
      f"{LAYER}.lora_A.weight": A,
      f"{LAYER}.lora_B.weight": B,
      f"{LAYER}.lora_magnitude_vector": A[0, :3],
    },
    r"magnitudes of shape \(3,\); expected 8",
  ),
  "magnitudes twice": (
    {
      f"{FLAT}.lora_down.weight": A,
      f"{FLAT}.lora_up.weight": B,
      f"{FLAT}.dora_scale": B[:, :1],
      f"{FLAT}.lora_magnitude_vector": B[:, 0],
    },
    "both dora_scale and lora_magnitude_vector",
  ),
  "LoHa of two sizes": (
    {
      f"{FLAT}.hada_w1_a": B,
      f"{FLAT}.hada_w1_b": A,
      f"{FLAT}.hada_w2_a": B,
      f"{FLAT}.hada_w2_b": A[:, :6],
    },
    r"'hada_w1_b': \(3, 8\), .*'hada_w2_b': \(3, 6\)",
  ),
  "LoKr beyond measure": (
    {f"{FLAT}.lokr_w1": np.ones((999, 999)), f"{FLAT}.lokr_w2": np.ones((99, 99))},
    r"shape \(98901, 98901, 1, 1\), larger",
  ),
  "a bias of two axes": ({f"{FLAT}.diff_b": A}, r"norm or bias of shape \(3, 8\)"),
  "NaN in a norm": ({f"{FLAT}.w_norm": A[0] * np.nan}, r"attn1\.to_q holds NaN"),
  "nothing": ({}, "no tensors of a UNet LoRA"),
}


@pytest.mark.parametrize(("tensors", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(tensors, message, tmp_path):
  file = tmp_path / "broken.safetensors"
  save_file({name: np.asarray(t, np.float32) for name, t in tensors.items()}, file)
  with pytest.raises(InputError, match=message) as error:
    load_lora(str(file))
  assert str(file) in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_integers_are_no_factors(dtype, tmp_path):
  """They would be a quantised file's, whose scale is elsewhere; alpha may be one."""
  tensors = {f"{FLAT}.lora_down.weight": A.astype(dtype), f"{FLAT}.lora_up.weight": B}
  save_file(tensors, tmp_path / "x.safetensors")
  with pytest.raises(InputError, match=r"to_q holds integers \(.* as its down"):
    load_lora(str(tmp_path / "x.safetensors"))
  tensors |= {f"{FLAT}.lora_down.weight": A, f"{FLAT}.alpha": np.array(3).astype(dtype)}
  save_file(tensors, tmp_path / "x.safetensors")
  load_lora(str(tmp_path / "x.safetensors"))


def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch):
  tensors = {
    f"lora_unet_mid_block_resnets_{n}_conv1.{part}": np.ones((8, 8), np.float32)
    for n in (0, 1)
    for part in ("lokr_w1", "lokr_w2")
  }
  save_file(tensors, tmp_path / "x.safetensors")
  load_adapter(str(tmp_path / "x.safetensors"))
  monkeypatch.setattr(products, "LARGEST_UNET", 2 * 64**2 - 1)
  with pytest.raises(InputError, match="more numbers than any Stable Diffusion"):
    load_adapter(str(tmp_path / "x.safetensors"))


def test_a_truncated_file_is_named(exported):
  os.truncate(exported, exported.stat().st_size // 2)
  with pytest.raises(InputError, match=rf"{exported.name} is not a readable"):
    load_lora(str(exported))


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt"])
def test_a_pickle_is_never_opened(name, tmp_path):
  (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.")
  with pytest.raises(InputError, match=rf"{name} is a pickle.*\.safetensors"):
    load_lora(str(tmp_path / name))
