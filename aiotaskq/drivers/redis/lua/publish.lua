-- Store envelopes of one queue.
--
-- KEYS  1  base of the queue
--       2  the prefix of the keys that note unique ids, of all queues
-- ARGV  1  time shift
--       2  id of the call, or ''
--       3  groups, one after the other: kind, number of entries, entries
--            0 to 9  ready at that priority:       item
--            e       with a relative expiry time:  item
--            d       delayed:                      due, serial and item
--            u       unique:                       id, due or '', item or serial and item
-- The times in e, d and u may be + and seconds, from now on.
-- Return the unique ids that were stored before. A repeated call returns the first reply again.

local base, refused, at, now = KEYS[1], {}, 3, nil
local call = base .. 'call:' .. ARGV[2]

if ARGV[2] ~= '' then
  local known = redis.call('GET', call)
  if known then
    redis.call('EXPIRE', call, CALLS_FOR) -- a write: see write_for_replicas()
    return cmsgpack.unpack(known)
  end
end

local function put(due, item)
  now = now or clock(ARGV[1])
  place(base, due, item, now)
end

-- One group, or one entry, is stored in one list or in `delayed`, and fails as a whole. Of several,
-- some could be stored before another fails.
local words = ({ e = 1, d = 2, u = 3 })[ARGV[3]] or tonumber(ARGV[4])
if #ARGV > 4 + words then
  check_waiting(base)
end

while at < #ARGV do
  local kind, count = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  if kind == 'e' then
    for i = at, at + count - 1 do
      put('', ARGV[i])
    end
    at = at + count
  elseif kind == 'd' then
    for i = at, at + 2 * count - 1, 2 do
      put(ARGV[i], ARGV[i + 1])
    end
    at = at + 2 * count
  elseif kind == 'u' then
    for i = at, at + 3 * count - 1, 3 do
      if redis.call('EXISTS', KEYS[2] .. ARGV[i]) == 0 then
        put(ARGV[i + 1], ARGV[i + 2]) -- first, as it may fail
        redis.call('SET', KEYS[2] .. ARGV[i], 1, 'EX', UNIQUE_IDS_FOR)
      else
        refused[#refused + 1] = ARGV[i]
      end
    end
    at = at + 3 * count
  else
    redis.call('RPUSH', list_of(base, tonumber(kind)), unpack(ARGV, at, at + count - 1))
    notify(base)
    at = at + count
  end
end

if ARGV[2] ~= '' then
  redis.call('SET', call, cmsgpack.pack(refused), 'EX', CALLS_FOR)
elseif #refused > 0 then
  write_for_replicas(base .. 'none')
end
return refused
