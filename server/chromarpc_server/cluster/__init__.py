"""Devices of a Ray cluster: an actor on each GPU, and the server that has them as its devices.

Ray places actors and says when one ended. Everything else goes over a connection of our own from each actor to the
server, encrypted and authenticated: work, prompts, reports, pictures and adapters never reach Ray.
"""
