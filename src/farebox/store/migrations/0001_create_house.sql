-- The first plan of the house. Conventions: tables are singular and named as the glossary names the noun; money is
-- numeric(78,0) whole minor units beside its asset; instants are timestamptz; each index says which statement it serves.

-- One row: what this database is. Written by the first migration, never changed; a start in the other mode is refused.
CREATE TABLE installation (
    only_row      boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    mode          text NOT NULL CHECK (mode IN ('live', 'sandbox')),
    created_at    timestamptz NOT NULL DEFAULT now(),
    business_date timestamptz,                       -- sandbox only: the test clock; null means the wall clock
    CONSTRAINT installation_clock_in_sandbox CHECK (business_date IS NULL OR mode = 'sandbox')
);

-- ── people and keys ────────────────────────────────────────────────────────────────────────────────────────────────

CREATE TABLE api_key (
    id         text PRIMARY KEY,                     -- key_…
    name       text NOT NULL,
    key_hash   bytea NOT NULL CONSTRAINT api_key_hash_unique UNIQUE,   -- SHA-256 of fbx_sk_…
    hint       text NOT NULL,                        -- last four characters, for people
    scopes     text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);

CREATE TABLE idempotent_answer (
    actor          text NOT NULL,                    -- api_key.id
    key            text NOT NULL,
    request_digest bytea NOT NULL,                   -- method, path and body
    status         integer,                          -- null while the first request is still running
    body           bytea,
    created_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor, key)
);
-- Serves forgetting what is past its retention.
CREATE INDEX idempotent_answer_age ON idempotent_answer (created_at);

CREATE TABLE audit_entry (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    actor   text NOT NULL,
    action  text NOT NULL,
    subject text NOT NULL,
    detail  jsonb NOT NULL DEFAULT '{}',
    at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX audit_entry_subject ON audit_entry (subject, id);

CREATE TABLE customer (
    id             text PRIMARY KEY,
    name           text NOT NULL,
    email          text,
    currency       text,
    timezone       text NOT NULL DEFAULT 'UTC',
    billing        jsonb NOT NULL DEFAULT '{}',
    payment_method jsonb NOT NULL DEFAULT '{}',
    metadata       jsonb NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    erased_at      timestamptz
);

CREATE TABLE customer_key (
    id          text PRIMARY KEY,                    -- ck_…
    customer_id text NOT NULL REFERENCES customer,
    key_hash    bytea NOT NULL CONSTRAINT customer_key_hash_unique UNIQUE,   -- SHA-256 of fbx_ck_…
    hint        text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    revoked_at  timestamptz
);
CREATE INDEX customer_key_customer ON customer_key (customer_id);

-- ── catalog ────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Upstreams, routes, payments and server settings are read as one: a new version is one row, a bad file is none.
CREATE TABLE gateway_catalog (
    version    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    document   jsonb NOT NULL,
    digest     bytea NOT NULL,
    applied_by text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE metric (
    key         text PRIMARY KEY,
    id          text NOT NULL UNIQUE,                -- met_…
    name        text NOT NULL,
    description text NOT NULL DEFAULT '',
    aggregation text NOT NULL CHECK (aggregation IN
        ('sum', 'count', 'max', 'min', 'last', 'unique_count', 'percentile', 'average', 'weighted_sum')),
    property    text,
    value_type  text NOT NULL DEFAULT 'decimal',
    status      text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'inactive')),
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE price_plan_version (
    plan_id        text NOT NULL,
    version        integer NOT NULL CHECK (version > 0),
    name           text NOT NULL,
    currency       text NOT NULL,
    document       jsonb NOT NULL,                   -- billing_period, charges, entitlements, conventions, commitment
    digest         bytea NOT NULL,
    changelog      text NOT NULL DEFAULT '',
    effective_from timestamptz NOT NULL DEFAULT now(),
    deprecated_at  timestamptz,
    created_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (plan_id, version)
);

CREATE TABLE subscription (
    id             text PRIMARY KEY,
    customer_id    text NOT NULL REFERENCES customer,
    plan_id        text NOT NULL,
    plan_version   integer NOT NULL,
    status         text NOT NULL CHECK (status IN ('active', 'canceled', 'ended')),
    start_at       timestamptz NOT NULL,
    end_at         timestamptz,
    billing_anchor text NOT NULL DEFAULT 'anniversary' CHECK (billing_anchor IN ('anniversary', 'calendar')),
    timezone       text NOT NULL,                    -- the customer's zone when it began: moving does not move boundaries
    created_at     timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (plan_id, plan_version) REFERENCES price_plan_version,
    CONSTRAINT subscription_ends_after_start CHECK (end_at IS NULL OR end_at > start_at)
);
CREATE INDEX subscription_customer ON subscription (customer_id);

-- ── admission: grants, limits, leases, processes ───────────────────────────────────────────────────────────────────

-- What billing or a purchase tells the gateway. One row a subject; the version moves with every change.
CREATE TABLE admission_grant (
    id           text PRIMARY KEY,                   -- grn_…
    subject_kind text NOT NULL CHECK (subject_kind IN ('customer', 'pass')),
    subject_id   text NOT NULL,
    plan         text,                               -- for the {plan} header variable
    routes       text[],                             -- null: whatever the features allow
    features     text[] NOT NULL DEFAULT '{}',       -- granted features
    limits       jsonb NOT NULL DEFAULT '[]',        -- [{counter_id, kind, feature_key, metric_key, limit, on_exceed}]
    expires_at   timestamptz,                        -- for an account: when the limits' period ends and it must be renewed
    version      bigint NOT NULL DEFAULT 1,
    revoked_at   timestamptz,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT admission_grant_subject_unique UNIQUE (subject_kind, subject_id)
);

-- One counter per (customer, feature, period) or per limit of a pass. spent includes what open leases hold.
CREATE TABLE limit_counter (
    id           text PRIMARY KEY,                   -- quota:<customer>:<feature>:<period start> | pass:<pass>:calls
    grant_id     text NOT NULL REFERENCES admission_grant,
    customer_id  text,
    feature_key  text,
    metric_key   text,
    capacity     numeric,                            -- null: counted, not limited
    spent        numeric NOT NULL DEFAULT 0,
    hard         boolean NOT NULL DEFAULT true,      -- false: may pass the capacity (on_exceed: allow)
    period_start timestamptz,
    period_end   timestamptz
) WITH (fillfactor = 50);                            -- changed all the time: a new version finds room beside the old one
-- Serves the ingest's quota update.
CREATE INDEX limit_counter_metric ON limit_counter (customer_id, metric_key, period_start);

CREATE TABLE process (
    id           text PRIMARY KEY,                   -- gw_… one per life of a process
    kind         text NOT NULL,
    host         text NOT NULL,
    pid          integer NOT NULL,
    epoch        bigint GENERATED ALWAYS AS IDENTITY,
    started_at   timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    shipped_to   timestamptz,                        -- its spool is in the database up to here
    stopped_at   timestamptz,                        -- it said goodbye, or its supervisor buried it
    settled_at   timestamptz                         -- its spool is closed and shipped, its leases given back
);

-- A slice of a counter, held by one process.
CREATE TABLE lease (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    counter_id text NOT NULL REFERENCES limit_counter,
    process_id text NOT NULL REFERENCES process,
    granted    numeric NOT NULL CHECK (granted > 0),
    used       numeric NOT NULL DEFAULT 0,           -- as of the last heartbeat
    taken_at   timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    closed_at  timestamptz
);
-- Serves the recovery of a dead process's leases and the usage shown for a counter.
CREATE INDEX lease_open_process ON lease (process_id) WHERE closed_at IS NULL;
-- A process holds one open slice of a counter: asking again extends it, and a lost answer is found again by asking.
CREATE UNIQUE INDEX lease_open_counter ON lease (counter_id, process_id) WHERE closed_at IS NULL;

-- ── usage ──────────────────────────────────────────────────────────────────────────────────────────────────────────

-- One row an ingest transaction. What a calculation may see is decided by its snapshot and this xid, never by id.
CREATE TABLE ingest_batch (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),
    source      text NOT NULL,                       -- api | spool:<process> | backfill
    row_count   integer NOT NULL,
    ingested_at timestamptz NOT NULL DEFAULT now(),
    folded_at   timestamptz
);
CREATE INDEX ingest_batch_xid ON ingest_batch (xid);
-- Serves the folding of rollups.
CREATE INDEX ingest_batch_unfolded ON ingest_batch (id) WHERE folded_at IS NULL;

CREATE TABLE usage_event (
    event_id        text NOT NULL,
    customer_id     text,                            -- null: an exact fare or a pass without a customer
    metric_key      text NOT NULL,
    value           numeric NOT NULL,
    "timestamp"     timestamptz NOT NULL,
    idempotency_key text,                            -- null: shipped from a spool, made unique by spool_batch
    properties      jsonb NOT NULL DEFAULT '{}',
    batch_id        bigint NOT NULL
) PARTITION BY RANGE ("timestamp");
-- Serves every read of usage for a customer, a metric and a period.
CREATE INDEX usage_event_read ON usage_event (customer_id, metric_key, "timestamp");
-- Serves the folding of rollups. Batch numbers rise, so it is written at its right end only.
CREATE INDEX usage_event_batch ON usage_event (batch_id);
CREATE TABLE usage_event_rest PARTITION OF usage_event DEFAULT;

-- A partition's key cannot make the idempotency key unique over all days; this table does.
CREATE TABLE usage_event_key (
    idempotency_key text PRIMARY KEY,
    event_id        text NOT NULL,
    digest          bytea NOT NULL                   -- of customer, metric, value, timestamp and properties as sent
);

-- Rollup per customer-local day; the answer of GET /v1/usage/summary.
CREATE TABLE usage_day (
    customer_id text NOT NULL,
    metric_key  text NOT NULL,
    day         date NOT NULL,                       -- in the customer's zone
    events      bigint NOT NULL,
    total       numeric NOT NULL,
    highest     numeric NOT NULL,
    lowest      numeric NOT NULL,
    PRIMARY KEY (customer_id, metric_key, day)
);

-- What a spool file has delivered. Written in the transaction that copies the rows: exactly once without a key per event.
CREATE TABLE spool_batch (
    source       text NOT NULL,                      -- process id
    file         text NOT NULL,
    start_offset bigint NOT NULL,
    end_offset   bigint NOT NULL,
    row_count    integer NOT NULL,
    shipped_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (source, file, start_offset)
);

-- Creates the daily partitions (UTC) of [from_day, to_day]; existing ones stay. Called by migrate and by the worker, ahead
-- of time. Rows of a day that came before its partition did wait in usage_event_rest and are moved; ingest waits meanwhile.
CREATE FUNCTION ensure_usage_partitions(from_day date, to_day date) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    day      date;
    made     integer := 0;
    name     text;
    starts   timestamptz;
    ends     timestamptz;
BEGIN
    FOR day IN SELECT generate_series(from_day, to_day, interval '1 day')::date LOOP
        name := 'usage_event_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        -- The order in which an insert locks them; the first also lets only one caller in.
        LOCK TABLE ONLY usage_event IN SHARE UPDATE EXCLUSIVE MODE;
        LOCK TABLE usage_event_rest IN ACCESS EXCLUSIVE MODE;
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        starts := day::timestamp AT TIME ZONE 'UTC';
        ends := (day + 1)::timestamp AT TIME ZONE 'UTC';
        EXECUTE format('CREATE TABLE %I (LIKE usage_event INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
        EXECUTE format(
            'WITH moved AS (DELETE FROM usage_event_rest WHERE "timestamp" >= %L AND "timestamp" < %L RETURNING *)
             INSERT INTO %I SELECT * FROM moved', starts, ends, name);
        EXECUTE format('ALTER TABLE usage_event ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, starts, ends);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;

-- ── billing ────────────────────────────────────────────────────────────────────────────────────────────────────────

CREATE TABLE calculation (
    id           text PRIMARY KEY,                   -- calc_…
    customer_id  text NOT NULL REFERENCES customer,
    period_start timestamptz NOT NULL,
    period_end   timestamptz NOT NULL,
    watermark    pg_snapshot NOT NULL,               -- usage visible in this snapshot is in; the rest is late
    versions     jsonb NOT NULL,                     -- subscription → plan version, checked again at issue
    document     jsonb NOT NULL,                     -- the lines, exact
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL
);

CREATE TABLE invoice_counter (
    series text PRIMARY KEY,
    last   bigint NOT NULL
);

CREATE TABLE invoice (
    id             text PRIMARY KEY,
    number         text CONSTRAINT invoice_number_unique UNIQUE,
    customer_id    text NOT NULL REFERENCES customer,
    kind           text NOT NULL DEFAULT 'period' CHECK (kind IN ('period', 'one_off')),
    status         text NOT NULL CHECK (status IN ('draft', 'issued', 'paid', 'archived', 'void')),
    currency       text NOT NULL,
    period_start   timestamptz,
    period_end     timestamptz,
    subtotal_units numeric(78, 0) NOT NULL,
    tax_units      numeric(78, 0) NOT NULL DEFAULT 0,
    total_units    numeric(78, 0) NOT NULL,
    watermark      pg_snapshot,                      -- as in calculation
    calculation_id text,
    issued_at      timestamptz,
    created_at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX invoice_customer ON invoice (customer_id, created_at);

-- One subscription and period is invoiced once; a void invoice gives its periods back by deleting nothing but this row's claim.
CREATE TABLE invoiced_period (
    invoice_id      text NOT NULL REFERENCES invoice,
    subscription_id text NOT NULL REFERENCES subscription,
    period_start    timestamptz NOT NULL,
    period_end      timestamptz NOT NULL,
    rated_from      timestamptz NOT NULL,            -- before period_start where an interim invoice is completed
    kind            text NOT NULL DEFAULT 'usage',
    voided          boolean NOT NULL DEFAULT false
);
CREATE UNIQUE INDEX invoiced_period_unique ON invoiced_period (subscription_id, period_start, kind) WHERE NOT voided;

CREATE TABLE invoice_line (
    invoice_id      text NOT NULL REFERENCES invoice,
    line            integer NOT NULL,
    subscription_id text,
    charge_id       text NOT NULL,
    description     text NOT NULL,
    pricing_model   text NOT NULL,
    metric_key      text,
    quantity        numeric NOT NULL,
    exact_amount    numeric NOT NULL,                -- major units, before the one rounding
    amount_units    numeric(78, 0) NOT NULL,
    detail          jsonb NOT NULL,                  -- tier_breakdown, steps
    period_start    timestamptz,                     -- what the line is about, within the invoice's period
    period_end      timestamptz,
    PRIMARY KEY (invoice_id, line)
);

-- ── the book ───────────────────────────────────────────────────────────────────────────────────────────────────────

-- Each row moves an amount from one account to another, so every row, and with it the book, sums to zero per asset.
CREATE TABLE posting (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    entry       text NOT NULL,                       -- what makes the booking idempotent, e.g. payment:<id>
    leg         smallint NOT NULL,
    kind        text NOT NULL,                       -- exact_fare | pass_sale | invoice | refund | …
    source      text NOT NULL,
    destination text NOT NULL,
    asset       text NOT NULL,
    amount      numeric(78, 0) NOT NULL CHECK (amount > 0),
    reference   text NOT NULL,                       -- the payment, pass or invoice
    booked_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT posting_entry_once UNIQUE (entry, leg),
    CONSTRAINT posting_moves CHECK (source <> destination)
);
CREATE INDEX posting_reference ON posting (reference);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: reverse it instead', TG_TABLE_NAME;
END $$;
CREATE TRIGGER posting_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON posting
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_entry
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE VIEW ledger_balance AS
SELECT account, asset, sum(amount) AS balance
  FROM (SELECT destination AS account, asset, amount FROM posting
        UNION ALL
        SELECT source, asset, -amount FROM posting) AS moves
 GROUP BY account, asset;

-- ── exact fares ────────────────────────────────────────────────────────────────────────────────────────────────────

CREATE TABLE payment (
    payment_key       bytea PRIMARY KEY,             -- hash of network, asset, payer, nonce: one column, or the planner hashes the table
    id                text NOT NULL CONSTRAINT payment_id_unique UNIQUE,    -- pay_…
    idempotency_key   text CONSTRAINT payment_idempotency_unique UNIQUE,
    status            text NOT NULL CHECK (status IN
        ('reserved', 'verified', 'serving', 'served', 'settling', 'settled', 'released', 'failed', 'unknown', 'refunded')),
    flow              text NOT NULL,
    fare              text NOT NULL CHECK (fare IN ('exact', 'pass')),
    network           text NOT NULL,
    scheme            text NOT NULL,
    asset             text NOT NULL,                 -- token address on the wire
    book_asset        text NOT NULL,                 -- the asset's name in the book
    amount            numeric(78, 0) NOT NULL CHECK (amount >= 0),
    payer_address     text NOT NULL,
    recipient_address text NOT NULL,
    route_id          text NOT NULL,
    resource_path     text NOT NULL,
    request_digest    bytea NOT NULL,                -- method, host, path, query, body digest
    owner             text NOT NULL,                 -- process.id
    owner_epoch       bigint NOT NULL,
    settle_until      timestamptz,                   -- who settles now holds the row until then
    raw_transaction   bytea,
    transaction_hash  text,
    valid_before      timestamptz NOT NULL,
    failure           text,
    response_status   integer,                       -- the answer, kept for a replay by the same payer
    response_head     bytea,
    response_body     bytea,
    replay_until      timestamptz,
    metadata          jsonb NOT NULL DEFAULT '{}',
    created_at        timestamptz NOT NULL DEFAULT now(),
    settled_at        timestamptz
);
CREATE INDEX payment_payer ON payment (payer_address, created_at);
-- Serves the forgetting of answers past their time.
CREATE INDEX payment_replay ON payment (replay_until) WHERE response_body IS NOT NULL;
-- Serves the reconciler: rows whose owner may be gone.
CREATE INDEX payment_unfinished ON payment (created_at) WHERE status IN ('reserved', 'verified', 'serving', 'served', 'settling', 'unknown');

-- The sandbox's own ledger of tokens. Never used in live mode.
CREATE TABLE sandbox_account (
    address text NOT NULL,                           -- lower case
    asset   text NOT NULL,                           -- token address, lower case
    balance numeric(78, 0) NOT NULL CHECK (balance >= 0),
    PRIMARY KEY (address, asset)
);
CREATE TABLE sandbox_transfer (
    payment_key      bytea PRIMARY KEY,
    transaction_hash text NOT NULL UNIQUE,
    asset            text NOT NULL,
    payer            text NOT NULL,
    recipient        text NOT NULL,
    amount           numeric(78, 0) NOT NULL,
    made_at          timestamptz NOT NULL DEFAULT now()
);

-- ── passes ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CREATE TABLE pass (
    id          text PRIMARY KEY,                    -- pas_…
    route_id    text NOT NULL,
    offer_id    text,                                -- null: granted by the operator
    name        text NOT NULL,
    holder      text,                                -- payer address, customer or free text
    status      text NOT NULL CHECK (status IN ('active', 'paused', 'revoked')),
    limits      jsonb NOT NULL,                      -- what was promised: {"calls": 1000}
    starts_at   timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    purchase_id text UNIQUE,
    created_at  timestamptz NOT NULL DEFAULT now(),
    revoked_at  timestamptz
);

CREATE TABLE purchase (
    id          text PRIMARY KEY,                    -- pur_…
    quote_id    text NOT NULL,
    buyer       text NOT NULL,
    nonce       text NOT NULL,                       -- the purchase nonce (Idempotency-Key)
    rail        text NOT NULL,
    status      text NOT NULL CHECK (status IN ('pending', 'paid', 'failed')),
    quote       jsonb NOT NULL,                      -- the quote as signed
    payment_key bytea UNIQUE,
    pass_id     text REFERENCES pass,
    created_at  timestamptz NOT NULL DEFAULT now(),
    paid_at     timestamptz,
    CONSTRAINT purchase_once UNIQUE (quote_id, buyer, nonce)
);

-- ── jobs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CREATE TABLE job (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind        text NOT NULL,
    key         text NOT NULL,                       -- the same kind and key is queued once
    payload     jsonb NOT NULL DEFAULT '{}',
    status      text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued', 'running', 'dead')),
    run_at      timestamptz NOT NULL DEFAULT now(),
    attempts    integer NOT NULL DEFAULT 0,
    lease_owner text,
    lease_until timestamptz,
    last_error  text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT job_once UNIQUE (kind, key)
);
-- Serves the claim.
CREATE INDEX job_due ON job (run_at) WHERE status <> 'dead';
