-- What each account holds and has done, for its limits: keys that are not revoked; rotations and entries of the log in the
-- hour (since 1970) that `hour` says. Keys of a user count for the user, with an empty account. A trigger on the log
-- counts, whoever writes it: replicas of the version before do, too. Half of each page is left free: a count overwrites
-- its row within the page.

-- Commits wait until this is done, and none is in the middle.
SELECT head FROM meta FOR UPDATE;

CREATE TABLE tallies (
    account   TEXT   COLLATE "C" NOT NULL,
    user_id   TEXT   COLLATE "C" NOT NULL,
    keys      BIGINT NOT NULL,
    hour      BIGINT NOT NULL,
    rotations BIGINT NOT NULL,
    log_rows  BIGINT NOT NULL,
    PRIMARY KEY (account, user_id)
) WITH (fillfactor = 50);

-- The rows of one commit come together. Clocks differ: what comes of the hour before `hour` counts for `hour`.
CREATE FUNCTION tally_log() RETURNS TRIGGER LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO tallies AS t (account, user_id, keys, hour, rotations, log_rows)
    SELECT coalesce(n.account, ''), CASE WHEN n.account IS NULL THEN n.user_id ELSE '' END,
        sum(CASE n.action WHEN 'key.created' THEN 1 WHEN 'key.imported' THEN 1 WHEN 'root_key.created' THEN 1
            WHEN 'key.revoked' THEN -1 ELSE 0 END),
        max(n.at / 3600000000), count(*) FILTER (WHERE n.action = 'key.rotated'), count(*)
    FROM new_rows n WHERE n.account IS NOT NULL OR n.user_id IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2
    ON CONFLICT (account, user_id) DO UPDATE SET
        keys = t.keys + excluded.keys,
        rotations = excluded.rotations
            + CASE WHEN excluded.hour IN (t.hour, t.hour - 1) THEN t.rotations ELSE 0 END,
        log_rows = excluded.log_rows
            + CASE WHEN excluded.hour IN (t.hour, t.hour - 1) THEN t.log_rows ELSE 0 END,
        hour = CASE WHEN excluded.hour = t.hour - 1 THEN t.hour ELSE excluded.hour END;
    RETURN NULL;
END $$;

CREATE TRIGGER tally_log AFTER INSERT ON log REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION tally_log();

INSERT INTO tallies SELECT coalesce(account, ''), coalesce(user_id, ''), count(*), 0, 0, 0
    FROM keys WHERE revoked_at IS NULL GROUP BY 1, 2;
