-- Roles, members, budgets and counts of use.

ALTER TABLE accounts ADD COLUMN longest_life BIGINT;

-- A global role has the empty account.
CREATE TABLE roles (
    account  TEXT   COLLATE "C" NOT NULL,
    name     TEXT   COLLATE "C" NOT NULL,
    scopes   TEXT   NOT NULL,
    revision BIGINT NOT NULL,
    sum      BIGINT NOT NULL,
    PRIMARY KEY (account, name)
);

CREATE TABLE members (
    account  TEXT   COLLATE "C" NOT NULL REFERENCES accounts (id),
    user_id  TEXT   COLLATE "C" NOT NULL,
    role     TEXT   COLLATE "C" NOT NULL,
    revision BIGINT NOT NULL,
    sum      BIGINT NOT NULL,
    PRIMARY KEY (account, user_id)
);

CREATE INDEX accounts_of_member ON members (user_id, account);
CREATE INDEX members_with_role ON members (role, account);

-- What was spent of a key's quota, in the period that began at `period`.
CREATE TABLE quotas (
    key_id BYTEA  PRIMARY KEY,
    period BIGINT NOT NULL,
    used   BIGINT NOT NULL
);

-- Checks per key, hour (in hours since 1970) and reason.
CREATE TABLE usage (
    key_id BYTEA  NOT NULL,
    hour   BIGINT NOT NULL,
    reason BIGINT NOT NULL,
    count  BIGINT NOT NULL,
    PRIMARY KEY (key_id, hour, reason)
);

CREATE INDEX usage_by_hour ON usage (hour);
