-- Begin the lease of a new consumer.
--
-- KEYS  bases of its queues
-- ARGV  1  time shift
--       2  consumer
--       3  lease in seconds
-- Return the queue's time.

local now, real = clock(ARGV[1])
for _, base in ipairs(KEYS) do
  relieve(base)
  redis.call('ZADD', base .. 'consumers', text(now + tonumber(ARGV[3])), ARGV[2])
  redis.call('HSET', base .. 'meta', 'beat', text(real), 'lease:' .. ARGV[2], ARGV[3])
  redis.call('EXPIRE', base .. 'meta', DAY)
end
return text(now)
