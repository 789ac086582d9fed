"""Sets of images that people have judged: one file each for how they are stored; conf/human/ says which is which."""
