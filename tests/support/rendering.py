"""Settings of rendering, none of them at its default."""

SETTINGS = {
  "sampler": "euler",
  "steps": 7,
  "guidance": 3.0,
  "no_row_guidance": True,
  "guidance_rescale": 0.5,
  "negative_prompt": "red",
  "height": 16,
  "width": 24,
  "dtype": "bfloat16",
  "variant": "fp16",
  "vae": "other",
  "fix_text": True,
  "prompt_style": "long",
  "clip_skip": 1,
  "original_size": "512,768",
  "crop_top_left": "8,0",
  "target_size": "16,24",
  "negative_original_size": "9,9",
  "negative_crop_top_left": "1,2",
  "negative_target_size": "3,4",
}
