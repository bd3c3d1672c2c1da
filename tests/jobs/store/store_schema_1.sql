-- A database of the first release, as `iterdump` gives it.
BEGIN TRANSACTION;
CREATE TABLE images (
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        sha256 TEXT NOT NULL,
        PRIMARY KEY (job, sha256)
    ) WITHOUT ROWID;
INSERT INTO "images" VALUES('job2','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa');
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
INSERT INTO "jobs" VALUES(1,'job1','me','r','f',1000000000000001,'{}',1,0,'[]',0,1,5,NULL,NULL,0,NULL,NULL,NULL,0);
INSERT INTO "jobs" VALUES(2,'job2','me',NULL,'f',1000000000000002,'{}',1,0,'[]',0,0,NULL,4000000000000000,'succeeded',3,'[]','[]',X'',100);
CREATE UNIQUE INDEX jobs_by_request ON jobs (owner, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX jobs_by_owner ON jobs (owner, created_us, id);
CREATE INDEX jobs_by_end ON jobs (ended_us);
CREATE INDEX images_by_hash ON images (sha256);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',2);
COMMIT;
PRAGMA user_version = 1;
