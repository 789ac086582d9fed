"""The embedded world: a small, closed world of coloured shapes in which every claim can be checked offline."""
