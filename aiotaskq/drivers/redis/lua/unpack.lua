-- Store the contents of a parcel, once.
--
-- KEYS  1  base of the queue
-- ARGV  1  id of the parcel
--       2  its contents, as pack.lua returned them
-- Return 1, or 0 if it has arrived before.

local base = KEYS[1]

if redis.call('EXISTS', base .. 'parcel:' .. ARGV[1]) == 1 then
  write_for_replicas(base .. 'none')
  return 0
end
-- Half a parcel would be stored again with the whole of it.
check_waiting(base)
local seen = {}
for i = 2, #ARGV, 2 do
  local where = ARGV[i]
  if string.sub(where, 1, 1) ~= 'd' and not seen[where] then
    -- With its level noted, so that set_aside.lua finds the list, whichever it is.
    redis.call('LLEN', list_of(base, tonumber(where) or where))
    seen[where] = true
  end
end
for i = 2, #ARGV, 2 do
  local where, item = ARGV[i], ARGV[i + 1]
  if string.sub(where, 1, 1) == 'd' then
    redis.call('ZADD', base .. 'delayed', finite(string.sub(where, 2)) or 0, item)
  else
    redis.call('RPUSH', list_of(base, tonumber(where) or where), item)
  end
end
redis.call('SET', base .. 'parcel:' .. ARGV[1], 1, 'EX', DAY) -- last, as the above may fail
notify(base)
return 1
