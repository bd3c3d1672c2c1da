"""Generated messages and service stubs of `chromarpc.v1`; the source is protos/chromarpc/v1."""
