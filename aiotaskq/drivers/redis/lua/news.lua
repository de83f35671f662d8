-- Return the ids cancelled of late, and whether suspects wait, for one consumer.
--
-- KEYS  bases of its queues; last, the key `cancelled`
-- ARGV  1  consumer
--       2  time of the last cancelling that it knows of
-- Return false if it was given up, else
--       1  1 if suspects wait, else 0
--       2  ids that were cancelled since that time, each followed by its time, in order

local suspects = {}

for i = 1, #KEYS - 1 do
  if not redis.call('ZSCORE', KEYS[i] .. 'consumers', ARGV[1]) then
    return false
  end
  suspects[i] = KEYS[i] .. 'ready:suspects'
end
return {
  redis.call('EXISTS', unpack(suspects)) > 0 and 1 or 0,
  redis.call('ZRANGEBYSCORE', KEYS[#KEYS], '(' .. ARGV[2], text(clock(0) + TEN_YEARS), 'WITHSCORES')
}
