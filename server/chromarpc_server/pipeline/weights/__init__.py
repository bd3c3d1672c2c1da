"""Weights as they lie in files: reading, staging, quantized rows."""
