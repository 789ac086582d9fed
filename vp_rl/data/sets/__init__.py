"""Sets of images that people have judged, to train on and to measure on: one file each for how they are stored.

conf/human/ says which is which.
"""
