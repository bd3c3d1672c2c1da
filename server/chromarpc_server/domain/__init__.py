"""What a request means: requests, plans, events and errors as plain values.

Knows the standard library only: neither torch nor grpc.
"""
