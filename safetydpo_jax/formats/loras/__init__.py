"""LoRA files and directories: ours, diffusers', PEFT's and kohya's."""
