"""The lifetime of a job, from admission to its last event, and the store. Touches no tensor and no wire."""
