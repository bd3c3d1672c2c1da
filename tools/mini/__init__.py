"""Trains chroma-mini, the miniature checkpoint that ships with the server, from nothing but its own drawings."""
