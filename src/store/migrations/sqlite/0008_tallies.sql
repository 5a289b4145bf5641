-- What each account holds and has done, for its limits: keys that are not revoked; rotations and entries of the log in the
-- hour (since 1970) that `hour` says. Keys of a user count for the user, with an empty account. A trigger on the log
-- counts, whoever writes it.

CREATE TABLE tallies (
    account   TEXT    NOT NULL,
    user_id   TEXT    NOT NULL,
    keys      INTEGER NOT NULL,
    hour      INTEGER NOT NULL,
    rotations INTEGER NOT NULL,
    log_rows  INTEGER NOT NULL,
    PRIMARY KEY (account, user_id)
) STRICT, WITHOUT ROWID;

INSERT INTO tallies SELECT coalesce(account, ''), coalesce(user_id, ''), count(*), 0, 0, 0
    FROM keys WHERE revoked_at IS NULL GROUP BY 1, 2;

-- Clocks differ: what comes of the hour before `hour` counts for `hour`.
CREATE TRIGGER tally_log AFTER INSERT ON log WHEN new.account IS NOT NULL OR new.user_id IS NOT NULL BEGIN
    INSERT INTO tallies VALUES (
        coalesce(new.account, ''),
        iif(new.account IS NULL, new.user_id, ''),
        CASE new.action WHEN 'key.created' THEN 1 WHEN 'key.imported' THEN 1 WHEN 'root_key.created' THEN 1
            WHEN 'key.revoked' THEN -1 ELSE 0 END,
        new.at / 3600000000,
        new.action = 'key.rotated',
        1
    ) ON CONFLICT (account, user_id) DO UPDATE SET
        keys = keys + excluded.keys,
        rotations = excluded.rotations + iif(excluded.hour IN (hour, hour - 1), rotations, 0),
        log_rows = excluded.log_rows + iif(excluded.hour IN (hour, hour - 1), log_rows, 0),
        hour = iif(excluded.hour = hour - 1, hour, excluded.hour);
END;
