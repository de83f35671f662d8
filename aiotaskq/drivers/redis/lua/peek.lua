-- Return whether there are items to fetch, for a consumer that has queues in several slots.
--
-- shared.lua is not put before this script: to define its functions would be most of the work.
--
-- KEYS  1  base of a queue
-- ARGV  1  time shift
--       2  consumer
-- Return false if the consumer was given up, else
--       1  1 if suspects wait, else 0
--       2  1 if anything is ready, else 0
--       3  the time at which the first delayed item falls due, or ''
--       4  the queue's time

local base = KEYS[1]

if not redis.call('ZSCORE', base .. 'consumers', ARGV[2]) then
  return false
end
local more = redis.call('EXISTS', base .. 'ready', base .. 'levels')
local suspects = more > 0 and redis.call('EXISTS', base .. 'ready:suspects') or 0
local first = redis.call('ZRANGE', base .. 'delayed', 0, 0, 'WITHSCORES')[2] or ''
local time = redis.call('TIME')
return { suspects, more, first, string.format('%.6f', time[1] + time[2] / 1000000 + ARGV[1]) }
