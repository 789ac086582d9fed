"""Text-to-image models with a trainable adapter, one file a family."""
