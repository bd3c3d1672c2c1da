"""What Ray runs on a host. Knows Ray as little as Ray knows it: a class with one long method."""

from __future__ import annotations

import os

from chromarpc_server.cluster.invitation import Invitation


class DeviceActor:
    """One GPU of a cluster."""

    def serve(self, invitation: Invitation) -> None:
        """Computes for the server until the connection ends; ends the process then.

        Whatever its device's thread does meanwhile is for nobody.
        """
        # Read when torch first allocates, which is after this.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        # Here, so that a host without torch answers in a sentence, and the driver needs none.
        from chromarpc_server.cluster.host_server import serve  # noqa: PLC0415

        serve(invitation)
        os._exit(0)
