"""Who may call, how much, and what is never told."""
