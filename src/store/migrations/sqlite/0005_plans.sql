-- SQLite has no functions to keep: there are no replicas that renew here. The number is PostgreSQL's.
SELECT 1;
