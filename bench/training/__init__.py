"""Training input: what a job reads, how a data loader reads it, and how long an accelerator takes for it."""
