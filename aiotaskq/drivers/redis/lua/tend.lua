-- Housekeeping: promote what is due, take back what the dead held.
--
-- KEYS  bases of queues; last, the key `cancelled`
-- ARGV  1  time shift
--       2  server time after which the call is out of date
--       3  most items to promote, and most to take back, of each queue
--       4  '1' if the caller missed the server lately, else ''
--       5  consumers of the caller, which live
-- Return the server's time, then how many items were promoted and reclaimed.

local now, real = clock(ARGV[1])
local most = tonumber(ARGV[3])
local promoted, reclaimed = 0, 0

-- A call that lay in a buffer while the server stood still must not judge who renewed in time:
-- their renewals lie in other buffers.
if real > tonumber(ARGV[2]) then
  return { text(real), 0, 0 }
end

local function witness(base)
  if ARGV[4] == '1' then
    return true
  end
  for i = 5, #ARGV do
    if redis.call('ZSCORE', base .. 'consumers', ARGV[i]) then
      return true
    end
  end
  return false
end

-- Whether it was the server that stood still, not the consumer: nobody at all renewed for as
-- long, though somebody lives. All get another lease then, but once only until somebody renews.
local function stalled(base, consumer)
  local meta = redis.call('HMGET', base .. 'meta', 'beat', 'granted', 'lease:' .. consumer)
  local beat, lease = tonumber(meta[1] or real), tonumber(meta[3] or 0)
  if real - beat <= lease / 2 or meta[1] == meta[2] or not witness(base) then
    return false
  end
  grant(base, now)
  redis.call('HSET', base .. 'meta', 'granted', meta[1])
  return true
end

-- Whoever is fenced can neither renew nor settle, so nobody else touches what it held.
local function fence(base)
  local lapsed = redis.call(
    'ZRANGEBYSCORE', base .. 'consumers', '-inf', '(' .. text(now), 'LIMIT', 0, most)
  for _, consumer in ipairs(lapsed) do
    if stalled(base, consumer) then
      return
    end
    redis.call('ZREM', base .. 'consumers', consumer)
    redis.call('ZADD', base .. 'fenced', text(now), consumer)
    redis.call('HDEL', base .. 'meta', 'lease:' .. consumer)
  end
end

local function crash(base, item)
  local crashes, rest = string.match(item, '^(%d+)( %d .*)$')
  if not crashes then -- nothing that was put here by a script; it must not stop the others
    bury(base, item, '"not an item of a queue"', now)
    return
  end
  give_back(base, tonumber(crashes) + 1 .. rest, KEYS[#KEYS])
end

-- Take back from one fenced consumer; return how many. The highest numbers go first, so that
-- the lowest end up at the head, in this call or in one of the next.
local function take_back(base, consumer, limit)
  local held, numbers = base .. 'held:' .. consumer, numbers_of(base, consumer)
  local count = math.min(#numbers, limit)
  for i = #numbers, #numbers - count + 1, -1 do
    local item = redis.call('HGET', held, numbers[i])
    redis.call('HDEL', held, numbers[i])
    crash(base, item)
  end
  if count == #numbers then
    redis.call('ZREM', base .. 'fenced', consumer)
    redis.call('DEL', base .. 'floor:' .. consumer)
  end
  return count
end

local function tend(base)
  local due, left = promote(base, now, most), most
  fence(base)
  for _, consumer in ipairs(redis.call('ZRANGE', base .. 'fenced', 0, most - 1)) do
    if left > 0 then
      left = left - take_back(base, consumer, left)
    end
  end
  promoted, reclaimed = promoted + due, reclaimed + most - left
  if due > 0 or left < most then
    ring(base)
  end
end

for i = 1, #KEYS - 1 do
  tend(KEYS[i])
end
return { text(real), promoted, reclaimed }
