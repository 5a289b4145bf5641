-- What every renewal asks and every reading of the replicas' rows, as functions: a session plans what stands in one once,
-- and a statement that comes as text each time anew. They use the tables of the schema that the caller has set.

-- One unbroken life of the database: the server's own identity, its timeline (another one after each failover), the
-- database and the table (others after a restored dump), and how often people accepted a loss. The identity is read from
-- the server's disk, unless the caller has read it of a server that was started just then.
CREATE FUNCTION life(server BIGINT, identity TEXT, epoch BIGINT) RETURNS TEXT LANGUAGE plpgsql AS $$
BEGIN
    IF server IS DISTINCT FROM (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint THEN
        identity := (SELECT system_identifier::text FROM pg_control_system());
    END IF;
    RETURN substr(encode(sha256(convert_to(concat_ws(':', identity,
        substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8),
        (SELECT oid FROM pg_database WHERE datname = current_database()),
        'replicas'::regclass::oid, epoch), 'UTF8')), 'hex'), 1, 32);
END $$;

-- Writes a replica's row, if its count is one of those expected. What is acknowledged must be in the log: a number alone
-- acknowledges nothing. Without `link` there is nothing to be in the log.
CREATE FUNCTION renew(replica BYTEA, reached BIGINT, link BYTEA, seen BIGINT, next BIGINT) RETURNS BOOLEAN
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE replicas SET applied = reached, renew_seq = next,
        last_seen = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
    WHERE id = replica AND renew_seq >= seen AND renew_seq < next
        AND (link IS NULL OR EXISTS (SELECT FROM log WHERE revision = reached AND hash = link));
    RETURN FOUND;
END $$;

-- What a renewal is told of the database, and its link of the log's chain at `reached`.
CREATE FUNCTION standing(
    reached BIGINT, server BIGINT, identity TEXT,
    OUT head BIGINT, OUT lease_ms BIGINT, OUT longest_ms BIGINT, OUT life TEXT, OUT settled TEXT, OUT db_now BIGINT,
    OUT link BYTEA, OUT epoch BIGINT, OUT replicas BIGINT
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    SELECT m.head, m.lease_ms, m.longest_ms, life(server, identity, m.epoch), m.settled,
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
        (SELECT l.hash FROM log l WHERE l.revision = reached), m.epoch, (SELECT count(*) FROM replicas)
    INTO head, lease_ms, longest_ms, life, settled, db_now, link, epoch, replicas FROM meta m;
END $$;

-- The replicas' rows, what holds for all of them in each; and the links at these revisions.
CREATE FUNCTION roster(revisions BIGINT[], server BIGINT, identity TEXT) RETURNS TABLE (
    head BIGINT, longest_ms BIGINT, life TEXT, settled TEXT, db_now BIGINT, links TEXT, has_standbys TEXT,
    archived BIGINT, id BYTEA, name TEXT, applied BIGINT, renew_seq BIGINT, last_seen BIGINT
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT m.head, m.longest_ms, life(server, identity, m.epoch), m.settled,
        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
        (SELECT string_agg(l.revision || ':' || encode(l.hash, 'hex'), ',') FROM log l
            WHERE l.revision = ANY (revisions)),
        (current_setting('synchronous_standby_names') <> '')::text,
        coalesce((SELECT max(c.revision) FROM checkpoints c), 0),
        r.id, r.name, r.applied, r.renew_seq, r.last_seen FROM meta m LEFT JOIN replicas r ON true;
END $$;
