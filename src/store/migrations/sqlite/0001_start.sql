-- Instants are microseconds since 1970 (UTC). Lists are words joined by a blank, maps are JSON.
-- `sum` is a CRC-32 over a row's other columns: a damaged row is refused instead of believed.

CREATE TABLE meta (
    one       INTEGER PRIMARY KEY CHECK (one = 1),
    store_id  BLOB    NOT NULL,
    epoch     INTEGER NOT NULL,
    head      INTEGER NOT NULL,
    head_hash BLOB    NOT NULL
) STRICT;

CREATE TABLE accounts (
    id           TEXT    PRIMARY KEY,
    name         TEXT    NOT NULL,
    suspended_at INTEGER,
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL,
    revision     INTEGER NOT NULL,
    sum          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    id             BLOB    PRIMARY KEY,
    account        TEXT    REFERENCES accounts (id),
    user_id        TEXT,
    environment    TEXT    NOT NULL,
    name           TEXT,
    scopes         TEXT    NOT NULL,
    roles          TEXT    NOT NULL,
    expires_at     INTEGER,
    customers      TEXT    NOT NULL,
    allowed_cidrs  TEXT    NOT NULL,
    rate_limits    TEXT,
    quota          TEXT,
    metadata       TEXT,
    created_at     INTEGER NOT NULL,
    created_by     TEXT    NOT NULL,
    updated_at     INTEGER NOT NULL,
    disabled_at    INTEGER,
    revoked_at     INTEGER,
    revoke_reason  TEXT,
    revoke_comment TEXT,
    revision       INTEGER NOT NULL,
    sum            INTEGER NOT NULL,
    CHECK ((account IS NULL) <> (user_id IS NULL))
) STRICT, WITHOUT ROWID;

CREATE INDEX keys_of_account ON keys (account, id) WHERE account IS NOT NULL;
CREATE INDEX keys_of_user ON keys (user_id, id) WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX key_names_of_account ON keys (account, name)
    WHERE account IS NOT NULL AND name IS NOT NULL AND revoked_at IS NULL;
CREATE UNIQUE INDEX key_names_of_user ON keys (user_id, name)
    WHERE user_id IS NOT NULL AND name IS NOT NULL AND revoked_at IS NULL;

-- A digest is never removed: it is unique for ever, whoever owns it.
CREATE TABLE secrets (
    digest       BLOB    PRIMARY KEY,
    key_id       BLOB    NOT NULL REFERENCES keys (id),
    version      INTEGER NOT NULL,
    hint         TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER,
    sum          INTEGER NOT NULL,
    last_used_at INTEGER
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX secrets_of_key ON secrets (key_id, version);

CREATE TABLE log (
    revision      INTEGER PRIMARY KEY,
    at            INTEGER NOT NULL,
    action        TEXT    NOT NULL,
    account       TEXT,
    key_id        BLOB,
    user_id       TEXT,
    actor         TEXT    NOT NULL,
    actor_account TEXT,
    acting_user   TEXT,
    method        TEXT    NOT NULL,
    payload       TEXT    NOT NULL,
    prev_hash     BLOB    NOT NULL,
    hash          BLOB    NOT NULL
) STRICT;

CREATE INDEX log_of_account ON log (account, revision);
CREATE INDEX log_of_key ON log (key_id, revision);
CREATE INDEX log_of_actor ON log (actor, revision);

CREATE TABLE idempotency (
    caller      BLOB    NOT NULL,
    key         TEXT    NOT NULL,
    fingerprint BLOB    NOT NULL,
    key_id      BLOB    NOT NULL,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (caller, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_by_age ON idempotency (created_at);
