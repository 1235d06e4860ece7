"""The pages of the demo's report."""
