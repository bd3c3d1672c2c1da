"""The wire: servicers, proto to domain and back, errors to statuses.

Knows grpc, the domain and the engine's front door; never touches a tensor.
"""
