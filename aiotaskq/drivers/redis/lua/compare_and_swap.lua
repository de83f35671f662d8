-- Change a schedule and store the envelopes of its runs, if it still has the revision that was
-- seen.
--
-- KEYS  1  schedules
--       2  schedules by due time
--       3  bases of queues that items go to
-- ARGV  1  time shift
--       2  id of the schedule
--       3  '=' and the revision that was seen; '' if there must be no schedule of this id
--       4  the schedule in its place: revision, newline, body; '' to remove the schedule
--       5  when it is due, or ''
--       6  for each envelope: which of KEYS it goes to, due or '', item or serial and item
-- Return 1; or 0 if the revision is another one, and nothing was changed.

local now, id = clock(ARGV[1]), ARGV[2]
local there = redis.call('HGET', KEYS[1], id)

if (there and '=' .. string.match(there, '^[^\n]*') or '') ~= ARGV[3] then
  return 0
end

-- A script that fails midway is not undone. So the other keys are read before anything is written,
-- which fails if one is of a wrong type. And writes that need memory come first: a server over its
-- limit refuses the first of them, and with it the whole script.
redis.call('ZSCORE', KEYS[2], id)
for i = 3, #KEYS do
  check_waiting(KEYS[i])
end
for i = 6, #ARGV, 3 do
  place(KEYS[tonumber(ARGV[i])], ARGV[i + 1], ARGV[i + 2], now)
end
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[1], id)
else
  redis.call('HSET', KEYS[1], id, ARGV[4])
end
if ARGV[5] == '' then
  redis.call('ZREM', KEYS[2], id)
else
  redis.call('ZADD', KEYS[2], ARGV[5], id)
end
return 1
