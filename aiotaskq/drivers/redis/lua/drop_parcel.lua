-- Forget a parcel that has arrived.
--
-- KEYS  1  base of the queue that it came from
-- ARGV  1  its id
-- Return 1.

if redis.call('HGET', KEYS[1] .. 'parcel', 'id') == ARGV[1] then
  redis.call('DEL', KEYS[1] .. 'parcel')
end
return 1
