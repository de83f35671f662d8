-- Drop the items of a queue that wait, delayed ones included.
--
-- KEYS  1  base of the queue
-- Return how many items were dropped.

local base = KEYS[1]
local lists, count = {}, redis.call('ZCARD', base .. 'delayed')
for i, level in ipairs(LEVELS) do
  lists[i] = list_name(base, level)
  count = count + redis.call('LLEN', lists[i])
end
redis.call('UNLINK', base .. 'levels', base .. 'delayed', base .. 'wake', unpack(lists))
return count
