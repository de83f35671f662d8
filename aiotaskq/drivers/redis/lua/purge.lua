-- Drop the items of a queue that wait, delayed ones included.
--
-- KEYS  1  base of the queue
-- Return how many items were dropped.

local base = KEYS[1]
local count = redis.call('LLEN', base .. 'ready') + redis.call('ZCARD', base .. 'delayed')
for _, level in ipairs({ 1, 2, 3, 4, 5, 6, 7, 8, 9, 'suspects' }) do
  count = count + redis.call('LLEN', base .. 'ready:' .. level)
  redis.call('UNLINK', base .. 'ready:' .. level)
end
redis.call('UNLINK', base .. 'ready', base .. 'levels', base .. 'delayed', base .. 'wake')
return count
