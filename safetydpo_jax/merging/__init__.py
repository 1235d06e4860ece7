"""Several experts into one LoRA: Co-Merge, its activations, and the baselines."""
