"""The tables of the history in PostgreSQL, and the statements that use them.

`starcast_positions` has a row for each channel, whose key is empty, with the position of its newest
message; and a row for each idempotency key, with the position of the message that was published
with it. `starcast_messages` has the messages.
"""

# What makes the tables. The lock, whose number stands for this module, keeps programs that begin
# together from disturbing each other. In pages with space, an update does not change the indexes.
TABLES = """
SELECT pg_advisory_xact_lock(7598452219);
CREATE TABLE IF NOT EXISTS starcast_positions (
    channel text COLLATE "C" NOT NULL,
    key bytea NOT NULL,
    epoch text NOT NULL,
    "offset" bigint NOT NULL,
    expires timestamptz NOT NULL,
    PRIMARY KEY (channel, key)
) WITH (fillfactor = 50);
CREATE INDEX IF NOT EXISTS starcast_positions_expires ON starcast_positions (expires);
CREATE TABLE IF NOT EXISTS starcast_messages (
    channel text COLLATE "C" NOT NULL,
    epoch text NOT NULL,
    "offset" bigint NOT NULL,
    published timestamptz NOT NULL,
    expires timestamptz NOT NULL,
    payload bytea NOT NULL,
    PRIMARY KEY (channel, epoch, "offset")
);
CREATE INDEX IF NOT EXISTS starcast_messages_expires ON starcast_messages (expires);
"""

# How much later than it must, in seconds, a position expires at most. So not every message changes
# the time, which is in an index.
SLACK = 3600

# How many more messages of a channel are in the table at most than are to be kept. So there is not
# as often something to remove.
SURPLUS = 100

# A statement does not see, and does not remove, what others have published while it waited for
# them. So it looks for that among so many older messages of the channel.
OVERLOOKED = 1000

# $1 to $7: of each channel, in order: its name, the number of messages, how many are kept, the time
# to live of its position, an epoch in case it has none, an epoch that is known and its offset.
# $8 to $14: of each notification: the number of its channel; of its message the number within the
# channel, the payload (NULL after the first notification), the time to live, the idempotency key
# and the time to live of that; what follows the id.
#
# If the offset is behind the one that is known, or if a message with the same key was published
# meanwhile, a column becomes NULL, which is not allowed: so all of it is undone.
PUBLISH = f"""
WITH given AS (
    SELECT * FROM unnest(
        $1::text[], $2::int8[], $3::int8[], $4::float8[], $5::text[], $6::text[], $7::int8[]
    ) WITH ORDINALITY AS given (
        channel, count, size, ttl, new_epoch, known_epoch, known_offset, number
    )
), counted AS (
    INSERT INTO starcast_positions AS p (channel, key, epoch, "offset", expires)
    SELECT channel, '', new_epoch, count, clock_timestamp() + make_interval(secs => ttl)
    FROM given
    ON CONFLICT (channel, key) DO UPDATE SET
        "offset" = p."offset" + excluded."offset",
        expires = CASE
            WHEN p.expires < excluded.expires - make_interval(secs => {SLACK}) THEN excluded.expires
            ELSE p.expires
        END
    RETURNING channel, epoch, "offset", clock_timestamp() AS now
), located AS (
    SELECT number, counted.channel, epoch, now, count - size AS too_many,
        CASE
            WHEN epoch = known_epoch AND "offset" - count < known_offset THEN NULL
            ELSE "offset" - count
        END AS before,
        CASE WHEN "offset" / {SURPLUS} > ("offset" - count) / {SURPLUS} THEN "offset" - size END
            AS last_old,
        "offset" - size - count - {OVERLOOKED} AS first_old,
        count + {OVERLOOKED} AS most_old
    FROM given JOIN counted USING (channel)
), placed AS (
    SELECT row, channel, epoch, before + place AS "offset", now, place > too_many AS fits, payload,
        ttl, key, key_ttl, text
    FROM unnest(
        $8::int8[], $9::int8[], $10::bytea[], $11::float8[], $12::bytea[], $13::float8[],
        $14::text[]
    ) WITH ORDINALITY AS notification (
        number, place, payload, ttl, key, key_ttl, text, row
    )
    JOIN located USING (number)
), kept AS (
    INSERT INTO starcast_messages (channel, epoch, "offset", published, expires, payload)
    SELECT channel, epoch, "offset", now, now + make_interval(secs => ttl), payload
    FROM placed
    WHERE payload IS NOT NULL AND fits
), keys AS (
    INSERT INTO starcast_positions AS p (channel, key, epoch, "offset", expires)
    SELECT channel, key, epoch, "offset", now + make_interval(secs => key_ttl)
    FROM placed
    WHERE key IS NOT NULL
    ON CONFLICT (channel, key) DO UPDATE SET
        epoch = excluded.epoch,
        "offset" = excluded."offset",
        expires = CASE
            WHEN p.expires <= clock_timestamp() OR p.epoch <> excluded.epoch THEN excluded.expires
        END
), trimmed AS (
    DELETE FROM starcast_messages WHERE ctid = ANY (ARRAY(
        SELECT old.ctid FROM located CROSS JOIN LATERAL (
            SELECT m.ctid FROM starcast_messages AS m
            WHERE m.channel = located.channel AND m.epoch = located.epoch
                AND m."offset" BETWEEN first_old AND last_old
            LIMIT most_old
        ) AS old
    ))
)
SELECT epoch, "offset", pg_catalog.pg_notify(channel, chr(16) || epoch || '-' || "offset" || text)
FROM (SELECT channel, epoch, "offset", text FROM placed ORDER BY row) AS notification
"""

# $1, $2: channels and idempotency keys. Returns those that are known.
FIND_KEYS = """
SELECT k.channel, k.key, k.epoch, k."offset"
FROM unnest($1::text[], $2::bytea[]) AS asked (channel, key)
JOIN starcast_positions AS k USING (channel, key)
JOIN starcast_positions AS p ON p.channel = k.channel AND p.key = '' AND p.epoch = k.epoch
WHERE k.expires > clock_timestamp()
"""

# $1: a channel; $2: a new epoch; $3, $4: a known epoch and its offset. The messages of an old epoch
# are not found any more, and expire.
RENEW = """
UPDATE starcast_positions SET epoch = $2, "offset" = 0
WHERE channel = $1 AND key = '' AND epoch = $3 AND "offset" < $4
"""

# $1 to $6: of each read: the channel, the offset to begin after (or before), how many messages, the
# size, the times to live of messages and of the position.
# Returns, for each message, the number of the read, the position of the channel, whether that
# expires too soon, and the offset of the oldest message that is valid.
_READ = """
SELECT number, p.epoch, p."offset" AS top,
    p.expires < now() + make_interval(secs => position_ttl) AS is_due,
    oldest."offset" AS first, message."offset", message.payload
FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int8[], $5::float8[], $6::float8[])
    WITH ORDINALITY AS asked (channel, since, count, size, ttl, position_ttl, number)
CROSS JOIN LATERAL (
    SELECT * FROM starcast_positions AS p WHERE p.channel = asked.channel AND p.key = '' LIMIT 1
) AS p
LEFT JOIN LATERAL (
    SELECT m."offset" FROM starcast_messages AS m
    WHERE m.channel = p.channel AND m.epoch = p.epoch AND m."offset" > p."offset" - size
        AND m.published > now() - make_interval(secs => ttl)
    ORDER BY m."offset" LIMIT 1
) AS oldest ON true
LEFT JOIN LATERAL (
    SELECT m."offset", m.payload FROM starcast_messages AS m
    WHERE m.channel = p.channel AND m.epoch = p.epoch AND m."offset" >= oldest."offset"
        AND (since IS NULL OR m."offset" {comparison} since)
    ORDER BY m."offset" {direction} LIMIT count
) AS message ON true
"""
READ_FORWARD = _READ.format(comparison=">", direction="ASC")
READ_REVERSE = _READ.format(comparison="<", direction="DESC")

# $1 to $3: names of channels, in order, the times to live of their positions, epochs for new ones.
TOUCH = """
INSERT INTO starcast_positions AS p (channel, key, epoch, "offset", expires)
SELECT channel, '', epoch, 0, clock_timestamp() + make_interval(secs => ttl)
FROM unnest($1::text[], $2::float8[], $3::text[]) AS touched (channel, ttl, epoch)
ON CONFLICT (channel, key) DO UPDATE SET expires = greatest(p.expires, excluded.expires)
"""

# $1: how many rows. Those that are locked are left for the next time, so this waits for nobody.
SWEEP = [
    f"""
    DELETE FROM {table} WHERE expires < now() AND ctid = ANY (ARRAY(
        SELECT ctid FROM {table} WHERE expires < now()
        ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED
    ))
    """
    for table in ("starcast_messages", "starcast_positions")
]
