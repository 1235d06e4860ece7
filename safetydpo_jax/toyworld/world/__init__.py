"""The drawn world: symbols, scenes, captions, and the exact detector."""
