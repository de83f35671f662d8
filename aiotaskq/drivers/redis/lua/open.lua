-- Begin the lease of a new consumer.
--
-- KEYS  bases of its queues
-- ARGV  1  time shift
--       2  consumer
--       3  lease in seconds
--       4  what to keep about it with the first of them
-- Return the queue's time.

local now, real = clock(ARGV[1])
local info = redis.pcall('INFO', 'server') -- which the user may not be allowed to ask for
local uptime = type(info) == 'string' and
  tonumber(string.match(info, 'uptime_in_seconds:(%d+)'))

for i, base in ipairs(KEYS) do
  relieve(base)
  -- The server was started after the last sign of life, to the whole second: so it was the server
  -- that was away, and the others, who come back in a moment, are not to be judged by that.
  local beat = redis.call('HGET', base .. 'meta', 'beat')
  if beat and uptime and uptime + 1 <= real - tonumber(beat) then
    grant(base, now)
  end
  redis.call('ZADD', base .. 'consumers', text(now + tonumber(ARGV[3])), ARGV[2])
  redis.call('HSET', base .. 'meta', 'beat', text(real), 'lease:' .. ARGV[2], ARGV[3])
  if i == 1 then
    redis.call('HSET', base .. 'meta', 'about:' .. ARGV[2], ARGV[4])
  end
  redis.call('EXPIRE', base .. 'meta', DAY)
end
return text(now)
