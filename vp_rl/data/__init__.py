"""LightningDataModules: prompts to train a policy on, preferences to train a reward model on."""
