-- Prolong the lease of a consumer, unless it was given up.
--
-- KEYS  bases of its queues
-- ARGV  1  time shift
--       2  consumer
--       3  lease in seconds
-- Return 1, or 0 if it was given up in any of its queues.

local now, real = clock(ARGV[1])
local lease = tonumber(ARGV[3])

for _, base in ipairs(KEYS) do
  if not redis.call('ZSCORE', base .. 'consumers', ARGV[2]) then
    return 0
  end
end
for _, base in ipairs(KEYS) do
  allow_when_full(base)
  -- Nobody renewed for half a lease, but this consumer lives: so the server stood still. The other
  -- consumers are about to renew, too.
  local beat = finite(redis.call('HGET', base .. 'meta', 'beat'))
  if beat and real - beat > lease / 2 then
    extend_leases(base, now)
  end
  redis.call('ZADD', base .. 'consumers', 'XX', text(now + lease), ARGV[2])
  redis.call('HSET', base .. 'meta', 'beat', text(real), 'lease:' .. ARGV[2], ARGV[3])
  redis.call('EXPIRE', base .. 'meta', DAY)
end
return 1
