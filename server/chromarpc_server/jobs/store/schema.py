"""The database's schema, and the steps from each earlier one to it.

A step is never changed once it was released: what must change becomes another step.
"""

from __future__ import annotations

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of admission
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        request_id TEXT,
        fingerprint TEXT NOT NULL,
        created_us INTEGER NOT NULL,  -- microseconds since the epoch, as all times here
        plan TEXT NOT NULL,
        has_prompts INTEGER NOT NULL,
        needs_token INTEGER NOT NULL,
        adapters TEXT NOT NULL,
        starts INTEGER NOT NULL DEFAULT 0,  -- server processes that took it over
        attempts INTEGER NOT NULL DEFAULT 0,
        started_us INTEGER,
        ended_us INTEGER,
        state TEXT,
        done_steps INTEGER NOT NULL DEFAULT 0,
        ending TEXT,
        headers TEXT,
        events BLOB,
        bytes INTEGER NOT NULL DEFAULT 0  -- of its images and events
    );
    CREATE UNIQUE INDEX jobs_by_request ON jobs (owner, request_id) WHERE request_id IS NOT NULL;
    CREATE INDEX jobs_by_owner ON jobs (owner, created_us, id);
    CREATE INDEX jobs_by_end ON jobs (ended_us);
    CREATE TABLE images (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        sha256 TEXT NOT NULL,
        PRIMARY KEY (job, sha256)
    ) WITHOUT ROWID;
    CREATE INDEX images_by_hash ON images (sha256);
    """,
    # Whether its caller was told that it will be stopped.
    """
    ALTER TABLE jobs ADD COLUMN cancelled INTEGER NOT NULL DEFAULT 0;
    """,
    # Damage is seen, time is the store's own, and no file goes that was not meant to.
    """
    -- of what is stored of it
    ALTER TABLE jobs ADD COLUMN format INTEGER NOT NULL DEFAULT 1;
    -- SHA-256 of what its admission wrote
    ALTER TABLE jobs ADD COLUMN plan_check TEXT;
    -- and of what its end wrote, without events
    ALTER TABLE jobs ADD COLUMN end_check TEXT;
    -- and of events
    ALTER TABLE jobs ADD COLUMN events_check TEXT;
    -- since its admission
    ALTER TABLE jobs ADD COLUMN detached INTEGER NOT NULL DEFAULT 0;
    -- in the store's own time
    ALTER TABLE jobs ADD COLUMN admitted_kept_us INTEGER;
    ALTER TABLE jobs ADD COLUMN ended_kept_us INTEGER;
    UPDATE jobs SET admitted_kept_us = created_us, ended_kept_us = ended_us;
    DROP INDEX jobs_by_end;
    CREATE INDEX jobs_by_kept_end ON jobs (ended_kept_us);
    CREATE TABLE image_intents (  -- images that may lie in the folder although no job names them
        sha256 TEXT PRIMARY KEY
    ) WITHOUT ROWID;
    CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
    """,
)
"""`PRAGMA user_version` counts those that were applied."""
