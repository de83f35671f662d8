-- Begin the lease of a new consumer.
--
-- KEYS  bases of its queues
-- ARGV  1  time shift
--       2  consumer
--       3  lease in seconds
--       4  the description to keep of it, with the first of its queues
-- Return the queue's time.

local now, real = clock(ARGV[1])
local info = redis.pcall('INFO', 'server') -- the user may lack the permission for it
local uptime = type(info) == 'string' and
  tonumber(string.match(info, 'uptime_in_seconds:(%d+)'))

for i, base in ipairs(KEYS) do
  allow_when_full(base)
  -- The server was started after the last renewal, to the whole second. So the server was away, and
  -- the other consumers, which come back in a moment, must not be given up for that.
  local beat = finite(redis.call('HGET', base .. 'meta', 'beat'))
  if beat and uptime and uptime + 1 <= real - beat then
    extend_leases(base, now)
  end
  redis.call('ZADD', base .. 'consumers', text(now + tonumber(ARGV[3])), ARGV[2])
  redis.call('HSET', base .. 'meta', 'beat', text(real), 'lease:' .. ARGV[2], ARGV[3])
  if i == 1 then
    redis.call('HSET', base .. 'meta', 'about:' .. ARGV[2], ARGV[4])
  end
  redis.call('EXPIRE', base .. 'meta', DAY)
end
return text(now)
