-- Read dead letters, the newest first.
--
-- KEYS  1  base of the queue
-- ARGV  1  key of a letter, for only older ones, or ''
--       2  most to return
-- Return keys, each followed by its letter.

local before = ARGV[1] == '' and '+inf' or '(' .. ARGV[1]
local keys = redis.call(
  'ZREVRANGEBYSCORE', KEYS[1] .. 'dead', before, '-inf', 'LIMIT', 0, ARGV[2])
local found = {}
for i, key in ipairs(keys) do
  found[2 * i - 1] = key
  found[2 * i] = redis.call('HGET', KEYS[1] .. 'letters', key) or ''
end
return found
