-- Taking back what consumers held that were given up; put before the scripts that do it.

-- Whoever is fenced can neither renew nor settle, so nobody else touches what it held.
local function fence(base, consumer, now)
  redis.call('ZREM', base .. 'consumers', consumer)
  redis.call('ZADD', base .. 'fenced', text(now), consumer)
  redis.call('HDEL', base .. 'meta', 'lease:' .. consumer, 'about:' .. consumer)
end

local function quoted(note)
  return (string.gsub(note, '[%%%s%c]', function(char)
    return string.format('%%%02X', string.byte(char))
  end))
end

-- Give an item back with one crash more; the note is quoted.
local function crash(base, item, note, now, cancelled)
  local crashes, rest = string.match(item, '^(%d+)%S*( %d .*)$')
  if not crashes then -- nothing that was put here by a script; it must not stop the others
    bury(base, item, '"not an item of a queue"', '', now)
    return
  end
  give_back(base, (tonumber(crashes) + 1) .. ':' .. note .. rest, cancelled)
end

-- Take back from one fenced consumer; return how many. The highest numbers go first, so that
-- the lowest end up at the head, in this call or in one of the next.
local function take_back(base, consumer, limit, now, cancelled)
  local held, numbers = base .. 'held:' .. consumer, numbers_of(base, consumer)
  local count, note = math.min(#numbers, limit), nil
  if count > 0 then
    note = quoted(redis.call('HGET', base .. 'meta', 'note:' .. consumer)
      or 'the lease of ' .. consumer .. ' ran out')
  end
  for i = #numbers, #numbers - count + 1, -1 do
    local item = redis.call('HGET', held, numbers[i])
    redis.call('HDEL', held, numbers[i])
    crash(base, item, note, now, cancelled)
  end
  if count == #numbers then
    redis.call('ZREM', base .. 'fenced', consumer)
    redis.call('DEL', held, base .. 'floor:' .. consumer)
    redis.call('HDEL', base .. 'meta', 'note:' .. consumer)
  end
  return count
end

