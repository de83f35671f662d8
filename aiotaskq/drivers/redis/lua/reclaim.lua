-- Functions that take back the items of consumers that were given up; put before the scripts that
-- do so. No KEYS, ARGV or return of its own.
--
-- Theory of operation
--
-- A consumer is in one of three states, in each of its queues:
--
--   live     in `consumers`, with the time at which its lease ends
--   fenced   in `fenced`: given up, and some of its items may still be in `held:<consumer>`
--   gone     in neither, and it holds nothing
--
-- It goes from live to fenced, and from fenced to gone, and never back. An orderly close leads
-- from live to gone. fetch, settle and renew look into `consumers` first. So from the moment at
-- which it is fenced a consumer can neither take nor settle nor live on, and taking back its
-- items may be spread over as many calls as it needs, of any process: nobody else touches them.
--
-- Items are taken back from the highest receipt number down, each to the head of its list. So the
-- oldest item ends up first, also where a call stops midway and another one goes on.

-- Give a consumer up. A fenced consumer can neither renew nor settle.
local function fence(base, consumer, now)
  allow_when_full(base)
  redis.call('ZADD', base .. 'fenced', text(now), consumer)
  redis.call('ZREM', base .. 'consumers', consumer)
  redis.call('HDEL', base .. 'meta', 'lease:' .. consumer, 'about:' .. consumer)
end

local MOST_CRASHES = 1000000000 -- more are not counted

local function quoted(note)
  return (string.gsub(note, '[%%%s%c]', function(char)
    return string.format('%%%02X', string.byte(char))
  end))
end

-- Give an item back with one crash more. The note is quoted.
local function give_back_crashed(base, item, note, now, cancelled)
  local crashes, rest = string.match(item, '^(%d+)%S*( %d .*)$')
  if not crashes then -- not written by a script; it must not stop the items behind it
    add_dead_letter(base, item, '"not an item of a queue"', '', now)
    return
  end
  crashes = string.format('%d', math.min(tonumber(crashes), MOST_CRASHES) + 1)
  give_back(base, crashes .. ':' .. note .. rest, cancelled)
end

-- Take back up to `limit` items of one fenced consumer. Return how many.
local function take_back(base, consumer, limit, now, cancelled)
  local held, numbers = base .. 'held:' .. consumer, receipts_of(base, consumer)
  local count, note = math.min(#numbers, limit), nil
  if count > 0 then
    allow_when_full(base)
    note = quoted(redis.call('HGET', base .. 'meta', 'note:' .. consumer)
      or 'the lease of ' .. consumer .. ' ran out')
  end
  for i = #numbers, #numbers - count + 1, -1 do
    local item = redis.call('HGET', held, numbers[i])
    give_back_crashed(base, item or '', note, now, cancelled)
    redis.call('HDEL', held, numbers[i])
  end
  if count == #numbers then
    redis.call('ZREM', base .. 'fenced', consumer)
    redis.call('DEL', held, base .. 'floor:' .. consumer)
    redis.call('HDEL', base .. 'meta', 'note:' .. consumer)
  end
  return count
end

