"""Protobuf messages from and to the domain's values."""
