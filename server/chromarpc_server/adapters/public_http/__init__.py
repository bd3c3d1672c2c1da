"""HTTP requests for URLs that clients send: they reach public addresses only. Knows no files and no adapters."""
