"""What a run will do on the devices at hand, and what it will need, before it begins."""
