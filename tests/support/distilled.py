"""The UNets of published distilled models, as in their config.json files.

SSD-1B has a number of layers for each transformer and a plain middle. BK-SDM (small-sd,
tiny-sd) and KOALA have one resnet a level on the way down, and no middle.
"""

from safetydpo_jax.models import published

SSD_1B = published.SDXL_UNET | {
  "mid_block_type": "UNetMidBlock2D",
  "transformer_layers_per_block": (1, (2, 2), (4, 4)),
  "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}
SMALL_SD = published.SD15_UNET | {"layers_per_block": 1, "mid_block_type": None}
TINY_SD = SMALL_SD | {
  "block_out_channels": (320, 640, 1280),
  "down_block_types": ("CrossAttnDownBlock2D",) * 3,
  "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
KOALA_700M = published.SDXL_UNET | {
  "layers_per_block": 1,
  "mid_block_type": None,
  "transformer_layers_per_block": (1, 2, 5),
}
UNETS = {
  "SSD-1B": SSD_1B,
  "small-sd": SMALL_SD,
  "tiny-sd": TINY_SD,
  "KOALA-700M": KOALA_700M,
}
