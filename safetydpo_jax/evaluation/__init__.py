"""What images of a prompts CSV show: who judges them, how sure the figures are."""
