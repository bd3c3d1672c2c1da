"""Generated messages and stubs of `chromarpc.compat.v1`; the source is protos/chromarpc/compat/v1."""
