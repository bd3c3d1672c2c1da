"""Contracts kept for programs that were written for other services."""
