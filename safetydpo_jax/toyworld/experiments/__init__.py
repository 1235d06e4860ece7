"""The demo's stages, the study's trials and the attack's searches."""
