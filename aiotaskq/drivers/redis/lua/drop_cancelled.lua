-- Forget delayed items that were cancelled, before the notes of cancelled ids are dropped.
--
-- KEYS  1  cancelled
--       2  base of a queue
-- ARGV  1  the cursor that the previous call returned; '0' at first
--       2  about how many items to look at
-- Return the next cursor; '0' at the end.

local reply = redis.call('ZSCAN', KEYS[2] .. 'delayed', ARGV[1], 'COUNT', ARGV[2])

for i = 1, #reply[2], 2 do
  local member = reply[2][i]
  if redis.call('ZSCORE', KEYS[1], id_of(item_of(member))) then
    redis.call('ZREM', KEYS[2] .. 'delayed', member)
  end
end
return reply[1]
