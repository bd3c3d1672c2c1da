"""What runs on the thread that owns a device, and what is resident there. Knows no queue and no job, only work."""
