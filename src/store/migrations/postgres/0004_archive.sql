-- Up to where the log was archived: the entries up to `revision`, whose hash was `hash`, are in files outside, and the
-- chain goes on from there. `entries` is how many are outside by then, and an entry of the log says the same.
CREATE TABLE checkpoints (
    revision BIGINT PRIMARY KEY,
    hash     BYTEA  NOT NULL,
    entries  BIGINT NOT NULL,
    made_at  BIGINT NOT NULL
);

CREATE INDEX log_of_acting_user ON log (acting_user, revision) WHERE acting_user IS NOT NULL;
