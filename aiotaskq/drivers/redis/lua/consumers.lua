-- List the consumers whose leases run, each with the first of its queues.
--
-- KEYS  bases of queues
-- ARGV  1  time shift
-- Return consumers, each followed by its description in `meta`.

local now, found = clock(ARGV[1]), {}

for _, base in ipairs(KEYS) do
  for _, consumer in ipairs(
    redis.call('ZRANGEBYSCORE', base .. 'consumers', text(now), '+inf')) do
    local about = redis.call('HGET', base .. 'meta', 'about:' .. consumer)
    if about then
      found[#found + 1] = consumer
      found[#found + 1] = about
    end
  end
end
return found
