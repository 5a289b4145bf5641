-- Names of keys are unique in Unicode Normalization Form C. `name_nfc` is that form where a row's name is another one, as
-- releases before this one could store it; no key gets such a name any more. The step that adds the column fills it: SQLite
-- cannot normalize.
ALTER TABLE keys ADD COLUMN name_nfc TEXT;

CREATE INDEX key_name_nfc_of_account ON keys (account, name_nfc)
    WHERE account IS NOT NULL AND name_nfc IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX key_name_nfc_of_user ON keys (user_id, name_nfc)
    WHERE user_id IS NOT NULL AND name_nfc IS NOT NULL AND revoked_at IS NULL;

-- Ids of accounts are compared exactly, and no two differ in case alone.
CREATE UNIQUE INDEX accounts_by_folded_id ON accounts (lower(id));
