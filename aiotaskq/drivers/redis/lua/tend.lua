-- Housekeeping: promote what is due, take back what the dead held, drop what is long dead.
--
-- KEYS  bases of queues; last, the key `cancelled`
-- ARGV  1  time shift
--       2  server time after which the call is out of date
--       3  most items to promote, most to take back, and most letters to drop, of each queue
--       4  '1' if the caller missed the server lately, else ''
--       5  most dead letters that a queue keeps
--       6  seconds for which it keeps them, or ''
--       7  consumers of the caller, which live
-- Return the server's time, then how many items were promoted, reclaimed and dropped.

local now, real = clock(ARGV[1])
local most = tonumber(ARGV[3])
local promoted, reclaimed, trimmed = 0, 0, 0

-- A call that lay in a buffer while the server stood still must not judge who renewed in time:
-- their renewals lie in other buffers.
if real > tonumber(ARGV[2]) then
  return { text(real), 0, 0, 0 }
end

local function witness(base)
  if ARGV[4] == '1' then
    return true
  end
  for i = 7, #ARGV do
    if redis.call('ZSCORE', base .. 'consumers', ARGV[i]) then
      return true
    end
  end
  return false
end

-- Whether it was the server that stood still, not the consumer: nobody at all renewed for as
-- long, though somebody lives. All get another lease then, but once only until somebody renews,
-- or the server stands still again before anybody could.
local function stalled(base, consumer)
  local meta = redis.call('HMGET', base .. 'meta', 'beat', 'granted', 'lease:' .. consumer, 'seen')
  local beat, lease = tonumber(meta[1] or real), tonumber(meta[3] or '')
  if not lease or real - beat <= lease / 2 or not witness(base) then
    return false
  end
  if meta[1] == meta[2] and real - tonumber(meta[4] or real) <= lease / 2 then
    return false
  end
  relieve(base)
  grant(base, now)
  redis.call('HSET', base .. 'meta', 'granted', meta[1], 'seen', text(real))
  return true
end

-- Note that the server goes on, while those who were given another lease have yet to renew it.
local function attend(base)
  local meta = redis.call('HMGET', base .. 'meta', 'beat', 'granted')
  if meta[1] and meta[1] == meta[2] then
    relieve(base)
    redis.call('HSET', base .. 'meta', 'seen', text(real))
  end
end

local function judge(base)
  local lapsed = redis.call(
    'ZRANGEBYSCORE', base .. 'consumers', '-inf', '(' .. text(now), 'LIMIT', 0, most)
  for _, consumer in ipairs(lapsed) do
    if stalled(base, consumer) then
      return
    end
    fence(base, consumer, now)
  end
end

-- Drop the oldest of too many dead letters, and those that are too old; return how many.
local function trim(base)
  local there = redis.call('ZCARD', base .. 'dead')
  if there == 0 then
    return 0
  end
  local excess = math.min(there - tonumber(ARGV[5]), most)
  local keys = excess > 0 and redis.call('ZRANGE', base .. 'dead', 0, excess - 1) or {}
  if #keys == 0 and ARGV[6] ~= '' then
    keys = redis.call('ZRANGEBYSCORE', base .. 'dead', '-inf', text(now - tonumber(ARGV[6])),
      'LIMIT', 0, most)
  end
  if #keys > 0 then
    redis.call('ZREM', base .. 'dead', unpack(keys))
    redis.call('HDEL', base .. 'letters', unpack(keys))
  end
  return #keys
end

local function tend(base)
  local due, left = promote(base, now, most, KEYS[#KEYS]), most
  judge(base)
  attend(base)
  for _, consumer in ipairs(redis.call('ZRANGE', base .. 'fenced', 0, most - 1)) do
    if left > 0 then
      left = left - take_back(base, consumer, left, now, KEYS[#KEYS])
    end
  end
  promoted, reclaimed = promoted + due, reclaimed + most - left
  if due > 0 or left < most then
    ring(base)
  end
  trimmed = trimmed + trim(base)
end

for i = 1, #KEYS - 1 do
  tend(KEYS[i])
end
return { text(real), promoted, reclaimed, trimmed }
