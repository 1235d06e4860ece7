"""Tensor names of LoRA files: whose a tensor is, and which part of which layer."""

import pytest

from safetydpo_jax.formats.loras import names

OTHERS = {
  "text encoders": [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_te2_text_projection.oft_blocks",
    "lora_te3_encoder_block_0.lora_down.weight",
    "clip_l.encoder.layers.0.mlp.fc1.lora_down.weight",
    "clip_g.encoder.layers.0.mlp.fc1.dora_scale",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "text_encoders.clip_l.transformer.text_model.x.diff_b",
    "te1.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "te2_text_model_encoder.lora_down.weight",
    "text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "lycoris_text_model_encoder_layers_0_mlp_fc1.lokr_w1",
    "cond_stage_model.transformer.x.lora_down.weight",
    "conditioner.embedders.0.x.lora_down.weight",
  ],
  "the VAE": ["vae.decoder.conv_in.diff", "lora_vae_decoder_conv_in.alpha"],
  "embeddings": ["bundle_emb.style.clip_l", "bundle_emb.x.string_to_param.*"],
}
LAYER = ("down_blocks_1", "attentions_0", "transformer_blocks_0", "attn1", "to_out_0")
DOTTED = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
SGM = "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
SPELLINGS = [
  f"unet.{DOTTED}.lora.down.weight",
  f"unet.{DOTTED}.lora_A.weight",
  f"base_model.model.{DOTTED}.lora_A.default.weight",
  f"base_model.model.unet.{DOTTED}.lora_A.weight",
  f"{DOTTED}.lora_down.weight",
  "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
  ".down.weight",
  f"unet.{SGM}.lora_down.weight",
  f"diffusion_model.{SGM}.lora_A.weight",
  f"model.diffusion_model.{SGM}.lora_down.weight",
  f"{SGM}.lora_down.weight",
  f"lora_unet_{DOTTED.replace('.', '_')}.lora_down.weight",
  f"lora_unet_{SGM.replace('.', '_')}.lora_down.weight",
  f"lycoris_{DOTTED.replace('.', '_')}.lora_down.weight",
]


@pytest.mark.parametrize("who", OTHERS)
def test_what_is_not_the_unet_s_is_told_by_its_name(who):
  assert [names.owner(name) for name in OTHERS[who]] == [who] * len(OTHERS[who])


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_layer_has_many_names(name):
  assert names.owner(name) is None
  assert names.parse(name) == (LAYER, "down")


@pytest.mark.parametrize(
  "name",
  [
    "",
    "unet.",
    "diffusion_model..lora_down.weight",
    f"unet.{DOTTED}",
    f"unet.{DOTTED}.lora_down.bias",
    f"unet.{DOTTED}.lora_C.weight",
    f"diffusion_model.double_{SGM}.lora_down.weight",
    "diffusion_model.input_blocks.4.5.proj_in.lora_down.weight",
    f"lora_unet_input_blocks_{'9' * 5000}_1_proj_in.lora_down.weight",
    "lora_unet_input_blocks_\u0664_1_proj_in.lora_down.weight",
    "unet.down_blocks.1.x.lora_down.weight",
    "unet.down_blocks.1./../x.lora_down.weight",
    "unet.conv_in.a.lora_down.weight",
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight",
    "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight",
    "lora_transformer_blocks_0_attn_to_q.lora_down.weight",
    "../unet.conv_in.lora_down.weight",
  ],
)
def test_a_name_that_is_no_layer_s_is_not_guessed(name):
  assert names.parse(name) is None
