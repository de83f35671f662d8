-- Drop dead letters.
--
-- KEYS  1  base of the queue
-- ARGV  keys of letters
-- Return how many of them existed.

redis.call('HDEL', KEYS[1] .. 'letters', unpack(ARGV))
return redis.call('ZREM', KEYS[1] .. 'dead', unpack(ARGV))
