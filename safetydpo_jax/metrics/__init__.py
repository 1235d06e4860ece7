"""Detectors and quality metrics of real images: Q16, NudeNet, FID, CLIPScore."""
