"""Training algorithms as LightningModules."""
