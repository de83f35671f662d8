-- End the lease of a consumer and hand back its items, in order.
--
-- KEYS  bases of its queues; last, the key `cancelled`
-- ARGV  1  consumer
-- Return how many items were handed back. A queue in which it was given up is not touched.

local count = 0

for i = 1, #KEYS - 1 do
  check_ending(KEYS[i], ARGV[1], KEYS[#KEYS])
end
for i = 1, #KEYS - 1 do
  local base = KEYS[i]
  local held = base .. 'held:' .. ARGV[1]
  if redis.call('ZSCORE', base .. 'consumers', ARGV[1]) then
    local numbers = receipts_of(base, ARGV[1])
    allow_when_full(base)
    for n = #numbers, 1, -1 do
      give_back(base, redis.call('HGET', held, numbers[n]), KEYS[#KEYS])
      redis.call('HDEL', held, numbers[n])
    end
    redis.call('ZREM', base .. 'consumers', ARGV[1])
    redis.call('HDEL', base .. 'meta', 'lease:' .. ARGV[1], 'about:' .. ARGV[1])
    redis.call('DEL', held, base .. 'floor:' .. ARGV[1])
    if #numbers > 0 then
      notify(base)
    end
    count = count + #numbers
  end
end
return count
