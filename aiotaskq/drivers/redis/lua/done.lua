-- Forget items of one queue that the consumer believes to hold.
--
-- KEYS  1  base of the queue
-- ARGV  1  consumer
--       2  receipt numbers, each once
-- Return how many of them it held. settle.lua returns the others by number, and is slower.

if not redis.call('ZSCORE', KEYS[1] .. 'consumers', ARGV[1]) then
  return 0
end
return redis.call('HDEL', KEYS[1] .. 'held:' .. ARGV[1], unpack(ARGV, 2))
