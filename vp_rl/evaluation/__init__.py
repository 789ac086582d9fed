"""Evaluation: images on held-out prompts, paired intervals, reward-model accuracy, the report."""
