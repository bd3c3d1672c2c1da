"""Jobs from admission to their last event: queue, event log, device thread, model cache.

Knows the domain and the pipeline's front door; knows no wire.
"""
