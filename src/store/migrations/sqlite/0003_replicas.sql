-- One process owns the file: there are no replicas to note. The number is PostgreSQL's.
SELECT 1;
