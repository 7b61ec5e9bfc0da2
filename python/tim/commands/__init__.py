"""Sub-commands of `tim` that are too small to live beside what they call."""
