-- Drop what waits in a queue.
--
-- KEYS  1  base of the queue
-- Return how many items there were.

local base = KEYS[1]
local count = redis.call('LLEN', base .. 'ready') + redis.call('ZCARD', base .. 'delayed')
for level = 1, 9 do
  count = count + redis.call('LLEN', base .. 'ready:' .. level)
  redis.call('UNLINK', base .. 'ready:' .. level)
end
redis.call('UNLINK', base .. 'ready', base .. 'levels', base .. 'delayed', base .. 'wake')
return count
