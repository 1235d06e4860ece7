"""One expert's training: config, step, optimizer, checkpoints and logs."""
