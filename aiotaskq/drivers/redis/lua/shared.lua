-- Functions and rules that the scripts share; this file is put before each of them.
--
-- It has no KEYS, ARGV or return of its own. scripts.py puts constants before it, which other
-- drivers have as well: SUSPECT, and the seconds UNIQUE_IDS_FOR and CALLS_FOR.
-- The keys and the form of items are described in two other places, and only there: keys.py and
-- items.py. A "base" is the beginning of all keys of one queue; `base .. 'ready'` is one of them.
--
-- Theory of operation
--
-- An item is in exactly one of these places of its queue: a list of ready items, `delayed`, a
-- hash of held items, the dead letters, or a parcel on its way to another shard. Each script moves
-- it from one place to another. Redis runs one script at a time, so no other client sees an item in
-- two places, or in none.
--
-- * The server may die between two scripts, but not inside one: a script reaches the append-only
--   file, or a replica, as a whole. A caller that gets no reply cannot know whether its script
--   ran. So a script that would do harm when it is called twice recognizes the second call: by
--   receipt numbers (fetch, settle), by the id of the call (publish), of a parcel (unpack), or by
--   a revision (compare_and_swap).
-- * A script that fails midway is not undone. A key may be of another type, because another program
--   wrote it; set_aside.lua renames it, and the caller makes the call again. So where half a script
--   would do harm, it reads all keys that it may write before it writes the first: see
--   check_waiting().
-- * Values that another program may have written are read with finite(), and fields with
--   receipts_of(): an arithmetic error would fail the script each time.
-- * A server over its memory limit refuses a script whose first write may need memory. It lets a
--   script run to its end that begins with a deletion. See allow_when_full().
-- * Since Redis 7.2 the command WAIT waits for the last write of its own connection. A script that
--   finds its work done before writes something all the same. See write_for_replicas().
-- * All times are those of the server. Callers send relative times, as `+<seconds>`; scripts
--   convert.
-- * `wake` holds at most one token for a queue. A script that adds an item calls notify(), and so
--   does a fetch that leaves items behind: one token wakes one consumer after the other. For a
--   token that is lost, each waiting consumer looks again within a second.

local DAY = 86400 -- seconds
local TEN_YEARS = 3650 * DAY

-- Return the queue's time and the server's. They differ by the time that a test harness adds.
local function clock(shift)
  local time = redis.call('TIME')
  local real = tonumber(time[1]) + tonumber(time[2]) / 1000000
  return real + tonumber(shift), real
end

-- Return a time as text. tostring() would round it to a tenth of a millisecond.
local function text(seconds)
  return string.format('%.6f', seconds)
end

-- Make a script that frees memory, or is needed to free some, run on a server over its memory
-- limit. The first write of such a script has to be a deletion, and may be one of a key that
-- never exists.
local function allow_when_full(base)
  redis.call('DEL', base .. 'none')
end

-- Write a key and delete it. For scripts that find their work done by an earlier call: a WAIT that
-- follows is about this connection's last write, and that may have been other work.
local function write_for_replicas(key)
  redis.call('SET', key, 1)
  redis.call('DEL', key)
end

-- Return a stored number; nil where there is none, or none that one can calculate with.
local function finite(stored)
  local number = stored and tonumber(stored)
  if number and number == number and number ~= math.huge and number ~= -math.huge then
    return number
  end
end

local function level_of(item)
  local space = string.find(item, ' ', 1, true)
  return space and tonumber(string.sub(item, space + 1, space + 1)) or 0
end

-- Return the name of the list for a priority, or for suspects.
local function list_name(base, level)
  return level == 0 and base .. 'ready' or base .. 'ready:' .. level
end

-- Return the same, for a list that an item is about to be added to.
local function list_of(base, level)
  if level ~= 0 then
    redis.call('SADD', base .. 'levels', level)
  end
  return list_name(base, level)
end

local LEVELS = { 'suspects', 9, 8, 7, 6, 5, 4, 3, 2, 1, 0 }

-- Read the keys of the items of a queue that wait. This fails if one of them is of another type, and
-- place(), promote() and give_back() can fail by no other.
local function check_waiting(base)
  for _, level in ipairs(LEVELS) do
    redis.call('LLEN', list_name(base, level))
  end
  redis.call('SCARD', base .. 'levels')
  redis.call('ZCARD', base .. 'delayed')
end

-- Read the keys of the dead letters of a queue: likewise, for add_dead_letter().
local function check_dead(base)
  redis.call('ZCARD', base .. 'dead')
  redis.call('HLEN', base .. 'letters')
end

-- Read the keys that take back the items of a consumer: likewise, for the end of its lease.
local function check_ending(base, consumer, cancelled)
  check_waiting(base)
  check_dead(base)
  redis.call('ZCARD', base .. 'fenced')
  redis.call('HLEN', base .. 'meta')
  redis.call('HLEN', base .. 'held:' .. consumer)
  redis.call('ZCARD', cancelled)
end

local function id_of(item)
  return string.match(item, '^%d+%S* %d %S+ ([^\n]*)\n') or ''
end

local function is_suspect(item)
  return tonumber(string.match(item, '^(%d+)[: ]') or 0) >= SUSPECT
end

-- Put an item at the head of its list. One whose id was cancelled is forgotten instead.
local function give_back(base, item, cancelled)
  if item and not redis.call('ZSCORE', cancelled, id_of(item)) then
    redis.call('LPUSH', list_of(base, is_suspect(item) and 'suspects' or level_of(item)), item)
  end
end

-- Wake one idle consumer, now or as soon as there is one.
local function notify(base)
  if redis.call('EXISTS', base .. 'wake') == 0 then
    redis.call('RPUSH', base .. 'wake', 1)
  end
end

-- Return the item of a member of `delayed`, which begins with a serial number and a space.
local function item_of(member)
  return string.sub(member, (string.find(member, ' ', 1, true) or 0) + 1)
end

-- Return an item, or a member of `delayed`, with a relative time of expiry made absolute.
local function with_expiry(stored, now)
  local before, seconds, after = string.match(stored, '^([%x ]*%d+ %d )%+([%d.]+)( .*)$')
  return before and before .. text(now + tonumber(seconds)) .. after or stored
end

-- Store an item at the tail of its list, or in `delayed` if it is due later.
--   due     Unix time, or + and seconds from now on, or '' for an item that is not delayed
--   stored  the item; with a serial number and a space before it where `due` is given
local function place(base, due, stored, now)
  stored = with_expiry(stored, now)
  if due == '' then
    redis.call('RPUSH', list_of(base, level_of(stored)), stored)
    notify(base)
    return
  end
  if string.sub(due, 1, 1) == '+' then
    due = text(now + tonumber(string.sub(due, 2)))
  end
  if tonumber(due) <= now then
    local item = item_of(stored)
    redis.call('RPUSH', list_of(base, level_of(item)), item)
    notify(base)
    return
  end
  redis.call('ZADD', base .. 'delayed', due, stored)
  -- Waiting consumers wait until the earliest due time that they know.
  if redis.call('ZRANGE', base .. 'delayed', 0, 0)[1] == stored then
    notify(base)
  end
end

-- Move up to `most` items that are due to the tails of their lists. Cancelled ones are forgotten.
-- Return how many were due.
local function promote(base, now, most, cancelled)
  local due = redis.call('ZRANGEBYSCORE', base .. 'delayed', '-inf', text(now), 'LIMIT', 0, most)
  if #due == 0 then
    return 0
  end
  local any, lists = redis.call('EXISTS', cancelled) == 1, {}
  for _, member in ipairs(due) do
    local item = item_of(member)
    if not (any and redis.call('ZSCORE', cancelled, id_of(item))) then
      local level = level_of(item)
      lists[level] = lists[level] or {}
      table.insert(lists[level], item)
    end
  end
  redis.call('SCARD', base .. 'levels') -- these fail before anything is removed
  for level in pairs(lists) do
    redis.call('LLEN', list_name(base, level))
  end
  redis.call('ZREM', base .. 'delayed', unpack(due))
  for level, items in pairs(lists) do
    redis.call('RPUSH', list_of(base, level), unpack(items))
  end
  return #due
end

-- Keep an item as a dead letter. Its key is the time of its death, or the next free microsecond
-- after the newest letter, so that the order of keys is the order of deaths.
local function add_dead_letter(base, item, reason, details, now)
  -- Of the letters within reason: after a time without an end there is no next microsecond.
  local last = redis.call('ZREVRANGEBYSCORE', base .. 'dead', text(now + TEN_YEARS), '-inf',
    'WITHSCORES', 'LIMIT', 0, 1)[2]
  local key = text(math.max(now, (finite(last) or 0) + 0.000001))
  redis.call('HSET', base .. 'letters', key,
    '{"died_at":' .. text(now) .. ',"reason":' .. reason .. ',"details":' .. #details .. '}\n'
    .. details .. item)
  redis.call('ZADD', base .. 'dead', key, key)
end

-- Return the receipt numbers that a consumer holds, in order. Only numbers are read: few, and
-- small.
local function receipts_of(base, consumer)
  local numbers = {}
  for _, field in ipairs(redis.call('HKEYS', base .. 'held:' .. consumer)) do
    if #field < 16 and (field == '0' or string.match(field, '^[1-9]%d*$')) then
      numbers[#numbers + 1] = tonumber(field) -- other fields were written by no script
    end
  end
  table.sort(numbers)
  return numbers
end

-- Let the lease of every consumer begin anew, now.
local function extend_leases(base, now)
  for _, consumer in ipairs(redis.call('ZRANGE', base .. 'consumers', 0, -1)) do
    local lease = finite(redis.call('HGET', base .. 'meta', 'lease:' .. consumer))
    if lease then
      redis.call('ZADD', base .. 'consumers', 'XX', 'GT', text(now + lease), consumer)
    end
  end
end

