-- Read dead letters, the newest first.
--
-- KEYS  1  base of the queue
-- ARGV  1  only letters that died before this time, or ''
--       2  most to return
-- Return for each: key, the time by which it is sorted, letter.

local before = ARGV[1] == '' and '+inf' or '(' .. ARGV[1]
local keys = redis.call(
  'ZREVRANGEBYSCORE', KEYS[1] .. 'dead', before, '-inf', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local found = {}
for i = 1, #keys, 2 do
  found[#found + 1] = keys[i]
  found[#found + 1] = keys[i + 1]
  found[#found + 1] = redis.call('HGET', KEYS[1] .. 'letters', keys[i]) or ''
end
return found
