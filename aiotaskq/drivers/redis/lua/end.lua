-- Give a consumer up for dead and take back its items. maintain.lua takes back the rest of many.
--
-- KEYS  bases of its queues; last, the key `cancelled`
-- ARGV  1  time shift
--       2  consumer
--       3  most items to take back
--       4  how it died
-- Return how many items were taken back. A queue in which it was closed or given up before is
-- left alone.

local now, most = clock(ARGV[1]), tonumber(ARGV[3])
local left = most

for i = 1, #KEYS - 1 do
  check_ending(KEYS[i], ARGV[2], KEYS[#KEYS])
end
for i = 1, #KEYS - 1 do
  local base = KEYS[i]
  if redis.call('ZSCORE', base .. 'consumers', ARGV[2]) then
    fence(base, ARGV[2], now)
    redis.call('HSET', base .. 'meta', 'note:' .. ARGV[2], ARGV[4])
    local count = take_back(base, ARGV[2], left, now, KEYS[#KEYS])
    left = left - count
    if count > 0 then
      notify(base)
    end
  end
end
return most - left
