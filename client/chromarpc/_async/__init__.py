"""The asyncio client's parts. `tools/unasync.py` writes those of the blocking client from most of them."""
