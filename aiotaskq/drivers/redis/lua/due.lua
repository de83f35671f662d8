-- Read the schedules that are due, the earliest first.
--
-- KEYS  1  schedules
--       2  schedules by due time
-- ARGV  1  time shift
--       2  most to return
-- Entries without a schedule are deleted: they would keep others out.
-- Return 1  the queue's time
--        2  the earliest due time after that, or ''
--        3  for each: id, due time, the value stored under the id

local now = text(clock(ARGV[1]))
local due = redis.call(
  'ZRANGEBYSCORE', KEYS[2], '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local later = redis.call(
  'ZRANGEBYSCORE', KEYS[2], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local found = { now, later[2] or '' }

for i = 1, #due, 2 do
  local stored = redis.call('HGET', KEYS[1], due[i])
  if stored then
    found[#found + 1] = due[i]
    found[#found + 1] = due[i + 1]
    found[#found + 1] = stored
  else
    redis.call('ZREM', KEYS[2], due[i])
  end
end
return found
