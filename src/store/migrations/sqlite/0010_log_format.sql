-- One process owns the file, and it reads what it writes. The number is PostgreSQL's.
SELECT 1;
