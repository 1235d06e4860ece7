"""From prompts to images: samplers, the renderer, and folders of images."""
