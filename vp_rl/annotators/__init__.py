"""Annotators: who rates the images."""
