-- Which process owns the file. Each start of a server counts `term` up and draws a new `owner`; a transaction that finds
-- others than its own is not committed. See `sqlite/owner.rs`.
ALTER TABLE meta ADD COLUMN term INTEGER NOT NULL DEFAULT 0;
ALTER TABLE meta ADD COLUMN owner BLOB NOT NULL DEFAULT x'';
