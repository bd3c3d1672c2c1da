"""Adapters that clients send in chunks, until each is whole and kept."""
