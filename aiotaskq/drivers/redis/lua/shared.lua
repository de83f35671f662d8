-- What the scripts share; it is put before each of them.
--
-- No KEYS, ARGV or return of its own. What the scripts call a base is no key but what all keys
-- of one queue begin with, `<prefix>:{<queue>}:`, so that they lie in one slot of a cluster:
--
--   ready, ready:<1..9>  LIST    items that may be handed out, oldest first
--   ready:suspects       LIST    items that crashed SUSPECT times or more, handed out alone
--   levels               SET     the priorities above 0 that may have any, and `suspects`
--   delayed              ZSET    "<serial> <item>" by Unix time
--   held:<consumer>      HASH    receipt number -> item
--   consumers            ZSET    consumer by the Unix time at which its lease ends
--   fenced               ZSET    consumers that were given up, until what they held is taken back
--   floor:<consumer>     STRING  fetches with lower receipt numbers come too late
--   dead                 ZSET    keys of dead letters by the Unix time of their death
--   letters              HASH    key -> "<JSON head>\n<details><item>"
--   wake                 LIST    at most one token, for one idle consumer
--   nudge:<consumer>     LIST    the same, by itself, when something falls due: see nudge.lua
--   meta                 HASH    beat: when anybody last renewed a lease, by the server's own clock
--                                granted: the beat after which everybody was given another lease
--                                seen: when the server last worked since then, while nobody renews
--                                lease:<consumer>: its length in seconds
--                                about:<consumer>: "<JSON list of its queues>\n<what it tells of
--                                itself>", with the first of its queues
--                                note:<consumer>: how one died that is in `fenced`, if it is known
--   call:<call id>       STRING  the answer to that call of publish
--   parcel               HASH    in a cluster, what is on its way to the slot where it belongs: its
--                                id, the number of the shard it goes to, and what is in it
--   parcel:<id>          STRING  that parcel has arrived
--
-- An item is `<crashes> <priority> <expires at, or -> <id>\n<body>`. Scripts touch the head only.
-- Crashes are a number, and where there were any a colon and how the last consumer died, quoted as
-- in a URL: `2:its%20process%20died 0 - <id>`. What a script is given to store may say `+<seconds>`
-- for when it expires, and for when it is due: from now on.
-- SUSPECT, a number, is put before all this.

local DAY = 86400

-- Return the queue's time and the server's; they differ by what a test harness lets pass.
local function clock(shift)
  local time = redis.call('TIME')
  local real = tonumber(time[1]) + tonumber(time[2]) / 1000000
  return real + tonumber(shift), real
end

-- tostring() would round to a tenth of a millisecond.
local function text(seconds)
  return string.format('%.6f', seconds)
end

-- Over its memory limit a server refuses a script whose first write may take memory, and lets
-- one run to its end that begins by deleting, be it nothing. For what must work to free memory.
local function relieve(base)
  redis.call('DEL', base .. 'none')
end

-- Write something of which nothing stays, in a script that has found its work done before. Since
-- Redis 7.2 WAIT is about what its own connection wrote last, and that may have been another's work.
local function touch(key)
  redis.call('SET', key, 1)
  redis.call('DEL', key)
end

local function level_of(item)
  local space = string.find(item, ' ', 1, true)
  return space and tonumber(string.sub(item, space + 1, space + 1)) or 0
end

-- Return the list for a priority, or for suspects.
local function list_of(base, level)
  if level == 0 then
    return base .. 'ready'
  end
  redis.call('SADD', base .. 'levels', level)
  return base .. 'ready:' .. level
end

local function id_of(item)
  return string.match(item, '^%d+%S* %d %S+ ([^\n]*)\n') or ''
end

local function is_suspect(item)
  return tonumber(string.match(item, '^(%d+)[: ]') or 0) >= SUSPECT
end

-- Put an item at the head of its list, unless its id was cancelled: then it is forgotten.
local function give_back(base, item, cancelled)
  if not redis.call('ZSCORE', cancelled, id_of(item)) then
    redis.call('LPUSH', list_of(base, is_suspect(item) and 'suspects' or level_of(item)), item)
  end
end

-- Wake one idle consumer, now or when there is one.
local function ring(base)
  if redis.call('EXISTS', base .. 'wake') == 0 then
    redis.call('RPUSH', base .. 'wake', 1)
  end
end

-- Return the item of a member of `delayed`, which begins with a serial number and a space.
local function item_of(member)
  return string.sub(member, (string.find(member, ' ', 1, true) or 0) + 1)
end

-- Return an item, or a member of `delayed`, with the time at which it expires, if it tells seconds.
local function dated(stored, now)
  local before, seconds, after = string.match(stored, '^([%x ]*%d+ %d )%+([%d.]+)( .*)$')
  return before and before .. text(now + tonumber(seconds)) .. after or stored
end

-- Store an item at the tail of its list; or if it is due (Unix time, or + and seconds, or '') later,
-- as a member of `delayed`. Only what is delayed begins with a serial number.
local function place(base, due, stored, now)
  stored = dated(stored, now)
  if due == '' then
    redis.call('RPUSH', list_of(base, level_of(stored)), stored)
    ring(base)
    return
  end
  if string.sub(due, 1, 1) == '+' then
    due = text(now + tonumber(string.sub(due, 2)))
  end
  if tonumber(due) <= now then
    local item = item_of(stored)
    redis.call('RPUSH', list_of(base, level_of(item)), item)
    ring(base)
    return
  end
  redis.call('ZADD', base .. 'delayed', due, stored)
  -- Those who wait go by what was the earliest so far.
  if redis.call('ZRANGE', base .. 'delayed', 0, 0)[1] == stored then
    ring(base)
  end
end

-- Move up to `most` items that are due to the tails of their lists, but for what was cancelled;
-- return how many were due.
local function promote(base, now, most, cancelled)
  local due = redis.call('ZRANGEBYSCORE', base .. 'delayed', '-inf', text(now), 'LIMIT', 0, most)
  if #due == 0 then
    return 0
  end
  redis.call('ZREM', base .. 'delayed', unpack(due))
  local any, lists = redis.call('EXISTS', cancelled) == 1, {}
  for _, member in ipairs(due) do
    local item = item_of(member)
    if not (any and redis.call('ZSCORE', cancelled, id_of(item))) then
      local level = level_of(item)
      lists[level] = lists[level] or {}
      table.insert(lists[level], item)
    end
  end
  for level, items in pairs(lists) do
    redis.call('RPUSH', list_of(base, level), unpack(items))
  end
  return #due
end

-- Keep an item as a dead letter. Its key is the time of its death, a little later if another
-- letter has that already, so that keys are in order.
local function bury(base, item, reason, details, now)
  local last = redis.call('ZRANGE', base .. 'dead', -1, -1, 'WITHSCORES')[2]
  local key = text(math.max(now, tonumber(last or 0) + 0.000001))
  redis.call('ZADD', base .. 'dead', key, key)
  redis.call('HSET', base .. 'letters', key,
    '{"died_at":' .. text(now) .. ',"reason":' .. reason .. ',"details":' .. #details .. '}\n'
    .. details .. item)
end

-- Return the receipt numbers that a consumer holds. Only numbers are read: few, and small.
local function numbers_of(base, consumer)
  local numbers = {}
  for _, field in ipairs(redis.call('HKEYS', base .. 'held:' .. consumer)) do
    numbers[#numbers + 1] = tonumber(field) -- what is none is not of our making
  end
  table.sort(numbers)
  return numbers
end

-- Give every consumer a lease from now on.
local function grant(base, now)
  for _, consumer in ipairs(redis.call('ZRANGE', base .. 'consumers', 0, -1)) do
    local lease = redis.call('HGET', base .. 'meta', 'lease:' .. consumer)
    if lease then
      redis.call('ZADD', base .. 'consumers', 'XX', 'GT', text(now + tonumber(lease)), consumer)
    end
  end
end

