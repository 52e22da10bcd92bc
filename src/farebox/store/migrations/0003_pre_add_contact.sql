-- What was heard from a process last is only half of a judgement: the other half is whether it could be heard.

-- When a lease's holder last answered the question what is left of it; null: it was never asked.
ALTER TABLE lease ADD COLUMN answered_at timestamptz;

-- Since when the heartbeats of a process have come without a gap: who could not reach the database himself cannot say
-- that another one was silent meanwhile.
ALTER TABLE process ADD COLUMN unbroken_since timestamptz NOT NULL DEFAULT now();
