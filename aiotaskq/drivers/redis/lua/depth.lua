-- Count items by state.
--
-- KEYS  bases of queues
-- ARGV  1  time shift
-- Return for each queue: ready (with delayed items that are due), delayed, held, dead.

local now, counts = text(clock(ARGV[1])), {}

for i, base in ipairs(KEYS) do
  local due = redis.call('ZCOUNT', base .. 'delayed', '-inf', now)
  local ready, held = redis.call('LLEN', base .. 'ready') + due, 0
  for _, level in ipairs(redis.call('SMEMBERS', base .. 'levels')) do
    ready = ready + redis.call('LLEN', base .. 'ready:' .. level)
  end
  for _, part in ipairs({ 'consumers', 'fenced' }) do
    for _, consumer in ipairs(redis.call('ZRANGE', base .. part, 0, -1)) do
      held = held + redis.call('HLEN', base .. 'held:' .. consumer)
    end
  end
  counts[i] = {
    ready, redis.call('ZCARD', base .. 'delayed') - due, held, redis.call('ZCARD', base .. 'dead')
  }
end
return counts
