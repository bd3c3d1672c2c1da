"""The transformer's forward without the waste: packed sequences, fused kernels, nothing computed twice."""
