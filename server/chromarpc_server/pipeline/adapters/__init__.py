"""Adapters (LoRA): files in, changes of named weights out."""

from chromarpc_server.pipeline.adapters.reader import Adapter, read_adapter

__all__ = ["Adapter", "read_adapter"]
