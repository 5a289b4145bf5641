-- Instants are microseconds since 1970 (UTC). Lists are words joined by a blank, maps are JSON.
-- `sum` is a CRC-32 over a row's other columns: a damaged row is refused instead of believed.
-- Text is compared byte by byte, as in SQLite and in Rust, whatever the database's own order is.

-- `term` counts the processes that have owned the database: what comes from an earlier one is refused.
CREATE TABLE meta (
    one       BIGINT PRIMARY KEY CHECK (one = 1),
    store_id  BYTEA  NOT NULL,
    epoch     BIGINT NOT NULL,
    head      BIGINT NOT NULL,
    head_hash BYTEA  NOT NULL,
    term      BIGINT NOT NULL
);

CREATE TABLE accounts (
    id           TEXT   COLLATE "C" PRIMARY KEY,
    name         TEXT   COLLATE "C" NOT NULL,
    suspended_at BIGINT,
    created_at   BIGINT NOT NULL,
    updated_at   BIGINT NOT NULL,
    revision     BIGINT NOT NULL,
    sum          BIGINT NOT NULL
);

-- `revoke_comment` is UTF-8 in bytes: people may write the character zero, which TEXT cannot hold.
CREATE TABLE keys (
    id             BYTEA  PRIMARY KEY,
    account        TEXT   COLLATE "C" REFERENCES accounts (id),
    user_id        TEXT   COLLATE "C",
    environment    TEXT   COLLATE "C" NOT NULL,
    name           TEXT   COLLATE "C",
    scopes         TEXT   NOT NULL,
    roles          TEXT   NOT NULL,
    expires_at     BIGINT,
    customers      TEXT   NOT NULL,
    allowed_cidrs  TEXT   NOT NULL,
    rate_limits    TEXT,
    quota          TEXT,
    metadata       TEXT,
    created_at     BIGINT NOT NULL,
    created_by     TEXT   NOT NULL,
    updated_at     BIGINT NOT NULL,
    disabled_at    BIGINT,
    revoked_at     BIGINT,
    revoke_reason  TEXT,
    revoke_comment BYTEA,
    revision       BIGINT NOT NULL,
    sum            BIGINT NOT NULL,
    CHECK ((account IS NULL) <> (user_id IS NULL))
);

CREATE INDEX keys_of_account ON keys (account, id) WHERE account IS NOT NULL;
CREATE INDEX keys_of_user ON keys (user_id, id) WHERE user_id IS NOT NULL;
CREATE UNIQUE INDEX key_names_of_account ON keys (account, name)
    WHERE account IS NOT NULL AND name IS NOT NULL AND revoked_at IS NULL;
CREATE UNIQUE INDEX key_names_of_user ON keys (user_id, name)
    WHERE user_id IS NOT NULL AND name IS NOT NULL AND revoked_at IS NULL;

-- A digest is never removed: it is unique for ever, whoever owns it.
CREATE TABLE secrets (
    digest       BYTEA  PRIMARY KEY,
    key_id       BYTEA  NOT NULL REFERENCES keys (id),
    version      BIGINT NOT NULL,
    hint         TEXT   NOT NULL,
    created_at   BIGINT NOT NULL,
    expires_at   BIGINT,
    sum          BIGINT NOT NULL,
    last_used_at BIGINT
);

CREATE UNIQUE INDEX secrets_of_key ON secrets (key_id, version);

CREATE TABLE log (
    revision      BIGINT PRIMARY KEY,
    at            BIGINT NOT NULL,
    action        TEXT   NOT NULL,
    account       TEXT   COLLATE "C",
    key_id        BYTEA,
    user_id       TEXT   COLLATE "C",
    actor         TEXT   COLLATE "C" NOT NULL,
    actor_account TEXT   COLLATE "C",
    acting_user   TEXT   COLLATE "C",
    method        TEXT   NOT NULL,
    payload       TEXT   NOT NULL,
    prev_hash     BYTEA  NOT NULL,
    hash          BYTEA  NOT NULL
);

CREATE INDEX log_of_account ON log (account, revision);
CREATE INDEX log_of_key ON log (key_id, revision);
CREATE INDEX log_of_actor ON log (actor, revision);

-- What was logged stays: not even Keyward's own role changes it without giving itself the right back first.
REVOKE UPDATE, DELETE, TRUNCATE ON log FROM CURRENT_USER;

CREATE TABLE idempotency (
    caller      BYTEA  NOT NULL,
    key         TEXT   COLLATE "C" NOT NULL,
    fingerprint BYTEA  NOT NULL,
    key_id      BYTEA  NOT NULL,
    created_at  BIGINT NOT NULL,
    PRIMARY KEY (caller, key)
);

CREATE INDEX idempotency_by_age ON idempotency (created_at);
