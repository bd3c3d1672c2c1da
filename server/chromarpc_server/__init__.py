"""The chromarpc server: domain, pipeline, engine and transport, composed in `app`."""
