"""LoRA files and directories: ours, and those of every tool."""
