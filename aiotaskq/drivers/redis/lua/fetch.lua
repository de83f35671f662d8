-- Hand out what is due.
--
-- KEYS  bases of the consumer's queues, in the order of draining; last, the key `cancelled`
-- ARGV  1  time shift
--       2  consumer
--       3  limit, at most 1000
--       4  receipt number to begin with, above all that the consumer used before
--       5  '', or the lowest receipt number of fetches whose replies the consumer may have
--          missed: what these took is returned first, and they do nothing if they come now
--       6  `suspects` or `others` if nothing else is wanted, else ''
--       7  if they are to be drained in another order: the numbers of the queues, 1 being the first
-- Return false if the consumer was given up, else
--       1  seconds until something falls due, or ''
--       2  1 if the call stopped early and may be made again at once, else 0
--       3  a list of runs: queue (1 is the first), receipt number of the first item, items
--       4  the server's time, by which the caller sees what is expired

local PROMOTED = 100 -- at most, of each queue, or as many as are asked for
local DROPPED = 1000 -- about the most: of what is cancelled

local now = clock(ARGV[1])
local consumer, left, number = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local queues, order, runs, dropped, wait = #KEYS - 1, {}, {}, 0, nil

for i = 1, queues do
  order[i] = tonumber(ARGV[6 + i] or i)
  if not redis.call('ZSCORE', KEYS[i] .. 'consumers', consumer) then
    return false
  end
end

-- Return again what was taken by fetches whose replies were lost. A suspect remains alone.
local function recall(missed)
  redis.call('DEL', KEYS[1] .. 'floor:' .. consumer) -- as in relieve()
  redis.call('SET', KEYS[1] .. 'floor:' .. consumer, ARGV[4], 'EX', 3600)
  for i = 1, queues do
    for _, taken in ipairs(numbers_of(KEYS[i], consumer)) do
      if taken >= missed and taken < number then
        local item = redis.call('HGET', KEYS[i] .. 'held:' .. consumer, taken)
        runs[#runs + 1] = { i, taken, item }
        left = is_suspect(item) and 0 or left - 1
      end
    end
  end
end

if ARGV[5] ~= '' then
  recall(tonumber(ARGV[5]))
elseif number < tonumber(redis.call('GET', KEYS[1] .. 'floor:' .. consumer) or 0) then
  return { '', 0, {}, text(now) }
end

local cancels = redis.call('EXISTS', KEYS[#KEYS]) == 1

-- Return the items that are not cancelled.
local function fit(items)
  if not cancels then
    return items
  end
  local kept, ids = {}, {}
  for i, item in ipairs(items) do
    ids[i] = id_of(item)
  end
  for i, at in ipairs(redis.call('ZMSCORE', KEYS[#KEYS], unpack(ids))) do
    if not at then
      kept[#kept + 1] = items[i]
    end
  end
  dropped = dropped + #items - #kept
  return kept
end

-- Hand out from one list; return true if it is empty then.
local function drain(queue, list)
  while left > 0 and dropped < DROPPED do
    local popped = redis.call('LPOP', list, left)
    if not popped then
      return true
    end
    local asked, items = left, fit(popped)
    if #items > 0 then
      local run, pairs = { queue, number }, {}
      for i, item in ipairs(items) do
        run[i + 2] = item
        pairs[2 * i - 1] = number
        pairs[2 * i] = item
        number = number + 1
      end
      redis.call('HSET', KEYS[queue] .. 'held:' .. consumer, unpack(pairs))
      runs[#runs + 1] = run
      left = left - #items
    end
    if #popped < asked then
      return true
    end
  end
  return false
end

local function serve(queue, levels)
  local base = KEYS[queue]
  local first = redis.call('ZRANGE', base .. 'delayed', 0, 0, 'WITHSCORES')[2]
  if first and tonumber(first) <= now then
    promote(base, now, math.max(PROMOTED, left), KEYS[#KEYS])
    first = redis.call('ZRANGE', base .. 'delayed', 0, 0, 'WITHSCORES')[2]
    levels = redis.call('SMEMBERS', base .. 'levels')
  end
  if first and (not wait or tonumber(first) - now < wait) then
    wait = tonumber(first) - now
  end
  table.sort(levels, function(one, other) return one > other end)
  for _, level in ipairs(levels) do
    if level ~= 'suspects' and drain(queue, base .. 'ready:' .. level) then
      redis.call('SREM', base .. 'levels', level)
    end
  end
  drain(queue, base .. 'ready')
end

local function holds_nothing()
  for queue = 1, queues do
    if redis.call('HLEN', KEYS[queue] .. 'held:' .. consumer) > 0 then
      return false
    end
  end
  return true
end

-- Hand one suspect out, alone; return whether there was one.
local function isolate(queue)
  local base, was = KEYS[queue], left
  local list = base .. 'ready:suspects'
  left = 1
  drain(queue, list)
  if redis.call('EXISTS', list) == 0 then
    redis.call('SREM', base .. 'levels', 'suspects')
  end
  if left == 0 then
    return true
  end
  left = was
  return false
end

-- Whether there is something that others could be given now.
local function has_more(base)
  if redis.call('EXISTS', base .. 'ready', base .. 'levels') > 0 then
    return true
  end
  local first = redis.call('ZRANGE', base .. 'delayed', 0, 0, 'WITHSCORES')[2]
  return first and tonumber(first) <= now
end

local levels, suspects, alone = {}, {}, false
for _, queue in ipairs(left > 0 and order or {}) do
  levels[queue] = redis.call('SMEMBERS', KEYS[queue] .. 'levels')
  for _, level in ipairs(levels[queue]) do
    if level == 'suspects' then
      suspects[#suspects + 1] = queue
    end
  end
end
if #suspects > 0 and ARGV[6] ~= 'others' and holds_nothing() then
  for _, queue in ipairs(suspects) do
    alone = alone or isolate(queue)
  end
end
for _, queue in ipairs(order) do
  if left > 0 and ARGV[6] ~= 'suspects' then
    serve(queue, levels[queue])
  end
end
if left <= 0 then
  -- Something may be left for others, who were not woken: one token came for many.
  for queue = 1, queues do
    if has_more(KEYS[queue]) then
      ring(KEYS[queue])
    end
  end
end
return { wait and text(math.max(wait, 0)) or '', dropped >= DROPPED and not alone and 1 or 0, runs, text(now) }
