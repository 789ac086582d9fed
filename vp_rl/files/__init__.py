"""Files that come from outside: one reader for each kind, which refuses by name and reason what it cannot read."""
