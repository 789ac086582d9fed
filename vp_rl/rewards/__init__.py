"""Rewards: one file each; all score images in [0, 1] for prompts."""
