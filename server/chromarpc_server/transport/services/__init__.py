"""The gRPC services, a module each."""
