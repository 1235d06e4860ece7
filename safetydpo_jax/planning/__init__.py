"""What a train step needs from a chip, found without having one."""
