-- Do the maintenance: promote due items, take back items of dead consumers, drop old dead letters.
--
-- KEYS  bases of queues; last, the key `cancelled`
-- ARGV  1  time shift
--       2  server time after which this call is out of date
--       3  most items to promote, and most to take back, of each queue
--       4  '1' if the caller itself could not reach the server lately, else ''
--       5  most dead letters that a queue keeps
--       6  seconds for which it keeps them, or ''
--       7  most dead letters to drop, of each queue
--       8  consumers of the caller, which are alive
-- Return the server's time, then how many items were promoted, reclaimed and dropped.
--
-- Theory of operation
--
-- A consumer whose lease ended is given up, unless it was the server that stood still: nobody could
-- renew then. Fields of `meta` distinguish the two:
--
-- * `beat` is the time of the last renewal by any consumer. If that is longer ago than half a lease,
--   and the caller knows of a living client, then the server stood still, and all leases begin anew.
-- * `granted` is the beat after which they did so. As long as the beat is still the same, nobody has
--   renewed since, and they do not begin anew again: dead consumers would live on for ever.
-- * `seen` is when the server last worked since then. If that is longer ago than half a lease, the
--   server stood still again before anybody could renew, and all leases begin anew once more.

local now, real = clock(ARGV[1])
local most = tonumber(ARGV[3])
local promoted, reclaimed, trimmed = 0, 0, 0

-- A call that lay in a buffer while the server stood still must not decide which consumers renewed
-- in time: the renewals lie in other buffers.
if real > tonumber(ARGV[2]) then
  return { text(real), 0, 0, 0 }
end

-- Return whether the caller knows that a client of the queue lives, or that the server was away.
local function caller_vouches(base)
  if ARGV[4] == '1' then
    return true
  end
  for i = 8, #ARGV do
    if redis.call('ZSCORE', base .. 'consumers', ARGV[i]) then
      return true
    end
  end
  return false
end

-- Return whether the server stood still, not the consumer. If so, all leases have begun anew.
local function server_stood_still(base, consumer)
  local meta = redis.call('HMGET', base .. 'meta', 'beat', 'granted', 'lease:' .. consumer, 'seen')
  local beat, lease = finite(meta[1]) or real, finite(meta[3])
  if not lease or real - beat <= lease / 2 or not caller_vouches(base) then
    return false
  end
  if meta[1] == meta[2] and real - (finite(meta[4]) or real) <= lease / 2 then
    return false
  end
  allow_when_full(base)
  extend_leases(base, now)
  redis.call('HSET', base .. 'meta', 'granted', meta[1], 'seen', text(real))
  return true
end

-- Note that the server works, while consumers whose leases began anew have yet to renew.
local function note_seen(base)
  local meta = redis.call('HMGET', base .. 'meta', 'beat', 'granted')
  if meta[1] and meta[1] == meta[2] then
    allow_when_full(base)
    redis.call('HSET', base .. 'meta', 'seen', text(real))
  end
end

local function fence_lapsed(base)
  local lapsed = redis.call(
    'ZRANGEBYSCORE', base .. 'consumers', '-inf', '(' .. text(now), 'LIMIT', 0, most)
  for _, consumer in ipairs(lapsed) do
    if server_stood_still(base, consumer) then
      return
    end
    fence(base, consumer, now)
  end
end

-- Drop the oldest dead letters where there are too many, else those that are too old. Return how
-- many.
local function trim(base)
  local there = redis.call('ZCARD', base .. 'dead')
  if there == 0 then
    return 0
  end
  local letters = tonumber(ARGV[7])
  local excess = math.min(there - tonumber(ARGV[5]), letters)
  local keys = excess > 0 and redis.call('ZRANGE', base .. 'dead', 0, excess - 1) or {}
  if #keys == 0 and ARGV[6] ~= '' then
    keys = redis.call('ZRANGEBYSCORE', base .. 'dead', '-inf', text(now - tonumber(ARGV[6])),
      'LIMIT', 0, letters)
  end
  if #keys > 0 then
    redis.call('ZREM', base .. 'dead', unpack(keys))
    redis.call('HDEL', base .. 'letters', unpack(keys))
  end
  return #keys
end

local function maintain(base)
  local due, left = promote(base, now, most, KEYS[#KEYS]), most
  if due > 0 then
    notify(base) -- before anything else may fail
  end
  fence_lapsed(base)
  note_seen(base)
  for _, consumer in ipairs(redis.call('ZRANGE', base .. 'fenced', 0, most - 1)) do
    if left > 0 then
      left = left - take_back(base, consumer, left, now, KEYS[#KEYS])
    end
  end
  promoted, reclaimed = promoted + due, reclaimed + most - left
  if left < most then
    notify(base)
  end
  trimmed = trimmed + trim(base)
end

for i = 1, #KEYS - 1 do
  maintain(KEYS[i])
end
return { text(real), promoted, reclaimed, trimmed }
