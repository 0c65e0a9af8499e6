-- Times are milliseconds since 1970-01-01T00:00:00Z; sizes say their unit. JSON columns hold objects of strings.

CREATE TABLE teams (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    created_ms INTEGER NOT NULL
);

CREATE TABLE api_keys (
    id         TEXT PRIMARY KEY,
    team_id    TEXT NOT NULL REFERENCES teams (id),
    name       TEXT NOT NULL,
    hash       BLOB NOT NULL UNIQUE,
    mask       TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    revoked_ms INTEGER
);

CREATE TABLE templates (
    id         TEXT PRIMARY KEY,
    -- NULL: shipped with belljar and open to every team.
    team_id    TEXT REFERENCES teams (id),
    name       TEXT NOT NULL UNIQUE,
    -- The finished build that sandboxes start from.
    build_id   TEXT NOT NULL,
    vcpus      INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib   INTEGER NOT NULL,
    processes  INTEGER NOT NULL,
    env        TEXT NOT NULL,
    user       TEXT NOT NULL,
    workdir    TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL
);

CREATE TABLE sandboxes (
    id                    TEXT PRIMARY KEY,
    team_id               TEXT NOT NULL REFERENCES teams (id),
    -- Not a reference: the record of a sandbox outlives its template.
    template_id           TEXT NOT NULL,
    template_name         TEXT NOT NULL,
    build_id              TEXT NOT NULL,
    state                 TEXT NOT NULL CHECK (state IN ('creating', 'running', 'ending', 'ended')),
    end_reason            TEXT,
    vcpus                 INTEGER NOT NULL,
    memory_mib            INTEGER NOT NULL,
    disk_mib              INTEGER NOT NULL,
    processes             INTEGER NOT NULL,
    metadata              TEXT NOT NULL,
    env                   TEXT NOT NULL,
    -- NULL: the creator asked for an agent without a token.
    access_token          TEXT,
    allow_internet_access INTEGER,
    started_ms            INTEGER NOT NULL,
    deadline_ms           INTEGER NOT NULL,
    ended_ms              INTEGER,
    CHECK ((state IN ('ending', 'ended')) = (end_reason IS NOT NULL))
);

-- Everything that may still hold resources; what has ended only grows.
CREATE INDEX sandboxes_live ON sandboxes (team_id, started_ms) WHERE state <> 'ended';

CREATE TABLE idempotency_keys (
    team_id      TEXT NOT NULL REFERENCES teams (id),
    key          TEXT NOT NULL,
    request_hash BLOB NOT NULL,
    sandbox_id   TEXT NOT NULL REFERENCES sandboxes (id),
    created_ms   INTEGER NOT NULL,
    PRIMARY KEY (team_id, key)
);
