"""Lightning callbacks: what a person sees of a run."""
