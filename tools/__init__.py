"""What developers run: checks, generators, the demo, and how chroma-mini was made."""
