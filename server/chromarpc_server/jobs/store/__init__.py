"""What is kept of jobs: rows in SQLite, pictures in files named by their hash; or both in memory."""
