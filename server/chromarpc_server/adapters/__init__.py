"""Files that requests name: below the root, uploaded, downloaded. Knows no queue and no job."""
