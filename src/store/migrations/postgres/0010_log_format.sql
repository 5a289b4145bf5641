-- The log format of a replica is the newest that it reads; releases before this step register without one, and read 0.
-- Format 1 has scopes with `/` and account ids with capital letters. The log gets an entry of a format only if every
-- registered replica reads it; from then on a replica that does not is refused. `meta` is not altered: commits hold it.

-- Commits wait until this is done, and none is in the middle.
SELECT head FROM meta FOR UPDATE;

CREATE TABLE log_state (
    one               BIGINT PRIMARY KEY CHECK (one = 1),
    newest_log_format BIGINT NOT NULL
);

INSERT INTO log_state SELECT 1, CASE WHEN EXISTS (SELECT FROM keys WHERE strpos(scopes, '/') > 0)
    OR EXISTS (SELECT FROM roles WHERE strpos(scopes, '/') > 0)
    OR EXISTS (SELECT FROM accounts WHERE id <> lower(id)) THEN 1 ELSE 0 END;

-- A commit and a registration order themselves by the row of `meta`: either the commit sees the replica, or the replica
-- sees the commit's format. The schema is that of the table, whatever the session's search_path is.
CREATE FUNCTION check_log_format() RETURNS TRIGGER LANGUAGE plpgsql AS $$
DECLARE
    newest BIGINT;
BEGIN
    EXECUTE format('SELECT head FROM %I.meta FOR SHARE', TG_TABLE_SCHEMA);
    EXECUTE format('SELECT newest_log_format FROM %I.log_state', TG_TABLE_SCHEMA) INTO newest;
    IF NEW.log_format < newest THEN
        RAISE EXCEPTION 'replica "%" runs an older release: the log contains entries of format %, and it reads formats up to %; start the newer release in its place',
            NEW.name, newest, NEW.log_format USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    RETURN NEW;
END $$;

-- Last: renewals wait from here to the end.
ALTER TABLE replicas ADD COLUMN log_format BIGINT NOT NULL DEFAULT 0;
CREATE TRIGGER check_log_format BEFORE INSERT ON replicas FOR EACH ROW EXECUTE FUNCTION check_log_format();
