"""Detectors and quality metrics for photographs: Q16, NudeNet, FID, CLIPScore."""
