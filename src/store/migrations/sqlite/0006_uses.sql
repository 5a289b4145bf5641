-- When each secret was last used, apart from the secrets: those stand in the order of their digests, which is by chance,
-- so that each use wrote a page of its own. Here uses that are noted together share pages, as `usage`'s do.

CREATE TABLE uses (
    key_id  BLOB    NOT NULL,
    version INTEGER NOT NULL,
    at      INTEGER NOT NULL,
    PRIMARY KEY (key_id, version)
) STRICT, WITHOUT ROWID;

INSERT INTO uses SELECT key_id, version, last_used_at FROM secrets WHERE last_used_at IS NOT NULL ORDER BY 1, 2;

ALTER TABLE secrets DROP COLUMN last_used_at;
