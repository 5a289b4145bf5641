-- Names of keys are unique in Unicode Normalization Form C. Releases before this one could store other forms, and their
-- replicas may still do so while this step's are started; the indexes hold these names alone. They are not unique: two
-- forms of one name may be there already.

-- Commits wait until this is done, and none is in the middle.
SELECT head FROM meta FOR UPDATE;

CREATE INDEX key_name_nfc_of_account ON keys (account, normalize(name, NFC))
    WHERE account IS NOT NULL AND revoked_at IS NULL AND name IS NOT NFC NORMALIZED;
CREATE INDEX key_name_nfc_of_user ON keys (user_id, normalize(name, NFC))
    WHERE user_id IS NOT NULL AND revoked_at IS NULL AND name IS NOT NFC NORMALIZED;

-- Ids of accounts are compared exactly, and no two differ in case alone.
CREATE UNIQUE INDEX accounts_by_folded_id ON accounts (lower(id));
