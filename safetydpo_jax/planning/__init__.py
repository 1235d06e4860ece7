"""What a train step needs of a chip, found without one."""
