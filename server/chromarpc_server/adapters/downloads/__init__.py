"""Adapters that requests name by URL: fetched once for all callers that want them, and cached."""
