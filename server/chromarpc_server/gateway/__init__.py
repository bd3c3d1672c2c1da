"""The way in for browsers and HTTP: Envoy in front of the gRPC server, and the page it serves.

Knows Envoy's configuration and process. Knows no servicer and no engine: the server behind it is an address.
"""
