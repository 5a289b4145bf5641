-- Many processes serve a PostgreSQL database, each with a lease: there is no owner to record. The number is SQLite's.
SELECT 1;
