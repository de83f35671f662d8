-- Put the items of queues that belong to other shards into parcels, one for each queue. A parcel
-- stays as it is until it has arrived, whichever processes send it, and however often.
--
-- KEYS  bases of queues
-- ARGV  1  most items in a parcel
--       2  most bytes, about
--       3  the number of shards
--       4  for each queue: the id of a new parcel, and the number of the shard that it goes to
-- Return for each queue that has a parcel: its number, id of the parcel, number of the shard,
-- contents. The contents are pairs: where an item goes (a priority, `suspects`, or `d` and the
-- Unix time at which it is due), and the item, or the member of `delayed`.

local parcels = {}

local function fill(base)
  check_waiting(base) -- what was taken out is nowhere else until all of it is in the parcel
  local found, bytes = {}, 0
  local function add(where, item)
    found[#found + 1] = where
    found[#found + 1] = item
    bytes = bytes + #item
  end
  local function is_full()
    return #found >= 2 * tonumber(ARGV[1]) or bytes >= tonumber(ARGV[2])
  end
  for _, level in ipairs(LEVELS) do
    local list = list_name(base, level)
    while not is_full() do
      local item = redis.call('LPOP', list)
      if not item then
        redis.call('SREM', base .. 'levels', level)
        break
      end
      add(tostring(level), item)
    end
  end
  while not is_full() do
    local first = redis.call('ZRANGE', base .. 'delayed', 0, 0, 'WITHSCORES')
    if not first[1] then
      break
    end
    redis.call('ZREM', base .. 'delayed', first[1])
    add('d' .. first[2], first[1])
  end
  return found
end

for i, base in ipairs(KEYS) do
  local kept = redis.call('HMGET', base .. 'parcel', 'id', 'shard', 'items')
  local whole, contents = pcall(cmsgpack.unpack, kept[3] or '')
  whole = whole and type(contents) == 'table' and #contents % 2 == 0 and
    string.match(kept[2] or '', '^%d%d?$') and tonumber(kept[2]) < tonumber(ARGV[3])
  if kept[1] and not whole then -- another program wrote it
    local parcel = base .. 'parcel'
    redis.call('RENAME', parcel, parcel .. ':aside:' .. ARGV[2 + 2 * i])
    kept[1] = false
  end
  if kept[1] then
    write_for_replicas(base .. 'none')
    parcels[#parcels + 1] = { i, kept[1], kept[2], contents }
  elseif redis.call('EXISTS', base .. 'ready', base .. 'levels', base .. 'delayed') > 0 then
    allow_when_full(base)
    local found, id, shard = fill(base), ARGV[2 + 2 * i], ARGV[3 + 2 * i]
    if #found > 0 then
      redis.call('HSET', base .. 'parcel', 'id', id, 'shard', shard, 'items', cmsgpack.pack(found))
      parcels[#parcels + 1] = { i, id, shard, found }
    end
  end
end
return parcels
