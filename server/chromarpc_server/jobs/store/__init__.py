"""What is kept of jobs: rows in SQLite, images in files named by their hash; or both in memory."""
