"""When a material gets its next generation: pure decisions from a snapshot, each with its reason."""
