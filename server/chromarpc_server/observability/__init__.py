"""What operators see: metrics, traces, logs and probes. Looks on, and changes nothing."""
