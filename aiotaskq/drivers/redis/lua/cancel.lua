-- Note ids that are not to be handed out any more.
--
-- KEYS  1  cancelled: ZSET, id by the Unix time of its cancelling
-- ARGV  1  time shift
--       2  seconds for which ids are kept
--       3  ids, as they stand in items
-- Return how many are new.

local now = clock(ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now - tonumber(ARGV[2])))
-- Consumers ask for what is later than what they know, so time must not go back here.
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
local at, pairs = text(math.max(now, tonumber(last or 0) + 0.000001)), {}
for i = 3, #ARGV do
  pairs[#pairs + 1] = at
  pairs[#pairs + 1] = ARGV[i]
end
return redis.call('ZADD', KEYS[1], unpack(pairs))
