-- Every kind of limit has a counter: amounts, slots, rates, and windows that begin anew by the database's clock.

ALTER TABLE limit_counter
    ADD COLUMN kind         text NOT NULL DEFAULT 'calls',  -- as the grant's limit says: quota, calls, credits, …
    ADD COLUMN window_s     integer CHECK (window_s > 0),   -- requests: spent is that of one window of this length
    ADD COLUMN window_start timestamptz;                    -- … which began here; null: none has begun yet
UPDATE limit_counter SET kind = 'quota' WHERE customer_id IS NOT NULL;

-- The window a slice was taken from. It is void in any other one.
ALTER TABLE lease ADD COLUMN window_start timestamptz;
