"""What is read and written: diffusers directories, LoRA files, experts, manifests."""
