-- Roles, members, budgets and counts of use.

ALTER TABLE accounts ADD COLUMN longest_life INTEGER;

-- A global role has the empty account.
CREATE TABLE roles (
    account  TEXT    NOT NULL,
    name     TEXT    NOT NULL,
    scopes   TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    sum      INTEGER NOT NULL,
    PRIMARY KEY (account, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE members (
    account  TEXT    NOT NULL REFERENCES accounts (id),
    user_id  TEXT    NOT NULL,
    role     TEXT    NOT NULL,
    revision INTEGER NOT NULL,
    sum      INTEGER NOT NULL,
    PRIMARY KEY (account, user_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX accounts_of_member ON members (user_id, account);
CREATE INDEX members_with_role ON members (role, account);

-- What was spent of a key's quota, in the period that began at `period`.
CREATE TABLE quotas (
    key_id BLOB    PRIMARY KEY,
    period INTEGER NOT NULL,
    used   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Checks per key, hour (in hours since 1970) and reason.
CREATE TABLE usage (
    key_id BLOB    NOT NULL,
    hour   INTEGER NOT NULL,
    reason INTEGER NOT NULL,
    count  INTEGER NOT NULL,
    PRIMARY KEY (key_id, hour, reason)
) STRICT, WITHOUT ROWID;

CREATE INDEX usage_by_hour ON usage (hour);
