-- Many processes serve one database: each has a row, and a lease that it renews by writing it.

-- In milliseconds; 9223372036854775807 = infinite. `lease_ms` is what a renewal grants, `longest_ms` the longest
-- that anybody may hold. `settled` is the newest life of the database in which all earlier leases have run out.
ALTER TABLE meta ADD COLUMN lease_ms BIGINT NOT NULL DEFAULT 60000;
ALTER TABLE meta ADD COLUMN longest_ms BIGINT NOT NULL DEFAULT 60000;
ALTER TABLE meta ADD COLUMN settled TEXT COLLATE "C" NOT NULL DEFAULT '';

-- An owner of before, if one runs still, learns that it is no longer alone, and stops.
UPDATE meta SET term = term + 1;

-- `applied`: every change up to there is in this process's memory; NULL = it holds no lease yet.
CREATE TABLE replicas (
    id        BYTEA  PRIMARY KEY,
    name      TEXT   COLLATE "C" NOT NULL,
    applied   BIGINT,
    renew_seq BIGINT NOT NULL,
    last_seen BIGINT NOT NULL
);
