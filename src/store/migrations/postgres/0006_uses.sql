-- When each secret was last used, apart from the secrets, whose rows are then written by changes alone. Half of each page
-- is left free: a use overwrites its row within the page. The column of `secrets` stays for replicas of the version
-- before, which write and read it; whoever reads looks at both.

CREATE TABLE uses (
    key_id  BYTEA  NOT NULL,
    version BIGINT NOT NULL,
    at      BIGINT NOT NULL,
    PRIMARY KEY (key_id, version)
) WITH (fillfactor = 50);

INSERT INTO uses SELECT key_id, version, last_used_at FROM secrets WHERE last_used_at IS NOT NULL ORDER BY 1, 2;
