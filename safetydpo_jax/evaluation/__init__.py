"""What the images of a prompts CSV show: detectors, figures with intervals, reports."""
