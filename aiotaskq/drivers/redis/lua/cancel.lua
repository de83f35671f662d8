-- Note ids that are not to be handed out any more.
--
-- KEYS  1  cancelled: ZSET, id by the Unix time of its cancelling
--       2  bases of all queues, if ids that are held are to be left alone; else none
-- ARGV  1  time shift
--       2  seconds for which ids are kept at least
--       3  the third value of the reply to the previous call, or ''
--       4  ids, as they stand in items
-- Return 1  1 if it is done; 0 if there is more to look at than one call may, and nothing was noted
--        2  ids that are held
--        3  the progress: JSON, the highest receipt number seen in each hash of held items
--        4  '', or the time before which there are notes, a day or more, that may be dropped

local SEEN, SEEN_BYTES = 1000, 4194304 -- items in one call

redis.call('DEL', KEYS[1] .. ':none') -- a deletion first: see allow_when_full()
local now = clock(ARGV[1])
local wanted, found, seen = {}, {}, ARGV[3] == '' and {} or cjson.decode(ARGV[3])
local count, bytes = 0, 0

for i = 4, #ARGV do
  wanted[ARGV[i]] = true
end

-- Look for the ids among the items of a consumer, from where the previous call ended: items that
-- the consumer took since then have greater numbers. Return whether that was all.
local function look(base, consumer)
  local held = base .. 'held:' .. consumer
  for _, number in ipairs(receipts_of(base, consumer)) do
    if number > (seen[held] or -1) then
      if count >= SEEN or bytes >= SEEN_BYTES then
        return false
      end
      local item = redis.call('HGET', held, number) or ''
      local id = id_of(item)
      if wanted[id] then
        wanted[id] = nil
        found[#found + 1] = id
      end
      count, bytes, seen[held] = count + 1, bytes + #item, number
    end
  end
  return true
end

for i = 2, #KEYS do
  for _, part in ipairs({ 'consumers', 'fenced' }) do
    for _, consumer in ipairs(redis.call('ZRANGE', KEYS[i] .. part, 0, -1)) do
      if not look(KEYS[i], consumer) then
        return { 0, found, cjson.encode(seen), '' }
      end
    end
  end
end

-- Consumers ask for ids that were cancelled after the last one that they know. So each call gets a
-- later time than the one before, though the clock may have been set back.
local last = redis.call('ZREVRANGEBYSCORE', KEYS[1], text(now + TEN_YEARS), '-inf',
  'WITHSCORES', 'LIMIT', 0, 1)[2]
local at, pairs = text(math.max(now, (finite(last) or 0) + 0.000001)), {}
for i = 4, #ARGV do
  if wanted[ARGV[i]] then
    pairs[#pairs + 1] = at
    pairs[#pairs + 1] = ARGV[i]
  end
end
if #pairs > 0 then
  redis.call('ZADD', KEYS[1], unpack(pairs))
end
local kept = now - tonumber(ARGV[2])
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
return { 1, found, '', finite(first) and finite(first) < kept - DAY and text(kept) or '' }
