-- Hand out due items to a consumer.
--
-- KEYS  bases of the consumer's queues, in the order of draining; last, the key `cancelled`
-- ARGV  1  time shift
--       2  consumer
--       3  limit, at most 1000
--       4  receipt number to begin with, above all that the consumer used before
--       5  '', or the lowest receipt number of earlier fetches whose replies did not arrive
--       6  `suspects` or `others` to hand out nothing else, or ''
--       7  numbers of the queues, 1 being the first, if this call drains them in another order, or
--          not all of them
-- Return false if the consumer was given up, else
--       1  seconds until the next item falls due, or ''
--       2  1 if the call stopped early and may be made again at once, else 0
--       3  a list of runs: queue (1 is the first), receipt number of the first item, items
--       4  the server's time, by which the caller decides which items are expired
--
-- Theory of operation
--
-- An item moves from a list into the consumer's hash `held:<consumer>` in one step, under a receipt
-- number that the consumer chose and never uses again. Three accidents are covered:
--
-- * The reply is lost. The consumer names, in its next call, the number with which the unanswered
--   fetches began (ARGV 5). All items that are held from there on are returned again, before
--   others.
-- * The request itself is late, and arrives after that next call. Its items would be held by a
--   consumer that does not know of them. So the next call sets `floor:<consumer>` to its own first
--   number, and a fetch below the floor does nothing.
-- * The consumer was given up meanwhile. It is no longer in `consumers`, and gets false. So no
--   item is ever held by a consumer whose items are taken back, or were.
--
-- Invariant: an item in `held:<consumer>` was returned to the consumer, or is returned by its next
-- fetch, or is taken back when its lease ends.
--
-- A suspect is handed out alone: as the only item of a reply, to a consumer that holds nothing.

local PROMOTED = 100 -- items of each queue, or as many as are asked for: the most to promote
local DROPPED = 1000 -- cancelled items, about: the most to drop in one call

local now = clock(ARGV[1])
local consumer, left, number = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local queues, order, runs, dropped, wait = #KEYS - 1, {}, {}, 0, nil

for i = 7, #ARGV do
  order[i - 6] = tonumber(ARGV[i])
end
for i = 1, queues do
  if #ARGV < 7 then
    order[i] = i
  end
  if not redis.call('ZSCORE', KEYS[i] .. 'consumers', consumer) then
    return false
  end
end

-- Return the items of unanswered fetches again. A suspect remains alone.
local function return_unanswered(first)
  redis.call('DEL', KEYS[1] .. 'floor:' .. consumer) -- a deletion first: see allow_when_full()
  redis.call('SET', KEYS[1] .. 'floor:' .. consumer, ARGV[4], 'EX', 3600)
  for i = 1, queues do
    for _, taken in ipairs(receipts_of(KEYS[i], consumer)) do
      if taken >= first and taken < number then
        local item = redis.call('HGET', KEYS[i] .. 'held:' .. consumer, taken) or ''
        runs[#runs + 1] = { i, taken, item }
        left = is_suspect(item) and 0 or left - 1
      end
    end
  end
end

if ARGV[5] ~= '' then
  return_unanswered(tonumber(ARGV[5]))
elseif number < (finite(redis.call('GET', KEYS[1] .. 'floor:' .. consumer)) or 0) then
  return { '', 0, {}, text(now) }
end

-- It fails here, and not behind the first removal, where the key is of another type.
local cancels = redis.call('ZCARD', KEYS[#KEYS]) > 0

-- Return the items that are not cancelled, and count the others.
local function without_cancelled(items)
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

-- Hand out from one list. Return true if the list is empty then.
local function hand_out(queue, list)
  while left > 0 and dropped < DROPPED do
    local popped = redis.call('LPOP', list, left)
    if not popped then
      return true
    end
    local asked, items = left, without_cancelled(popped)
    if #items > 0 then
      local run, pairs = { queue, number }, {}
      for i, item in ipairs(items) do
        run[i + 2] = item
        pairs[2 * i - 1] = number
        pairs[2 * i] = item
        number = number + 1
      end
      local done = redis.pcall('HSET', KEYS[queue] .. 'held:' .. consumer, unpack(pairs))
      if type(done) == 'table' and done.err then -- another program made it a key of another type
        for i = #items, 1, -1 do
          redis.call('LPUSH', list, items[i])
        end
        error(done.err)
      end
      runs[#runs + 1] = run
      left = left - #items
    end
    if #popped < asked then
      return true
    end
  end
  return false
end

-- Hand out from all lists of a queue but that of the suspects, the highest priority first.
local function hand_out_queue(queue, levels)
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
    if level ~= 'suspects' and hand_out(queue, base .. 'ready:' .. level) then
      redis.call('SREM', base .. 'levels', level)
    end
  end
  hand_out(queue, base .. 'ready')
end

local function holds_nothing()
  for queue = 1, queues do
    if redis.call('HLEN', KEYS[queue] .. 'held:' .. consumer) > 0 then
      return false
    end
  end
  return true
end

-- Hand out one suspect, alone. Return whether there was one.
local function hand_out_suspect(queue)
  local base, was = KEYS[queue], left
  local list = base .. 'ready:suspects'
  left = 1
  hand_out(queue, list)
  if redis.call('EXISTS', list) == 0 then
    redis.call('SREM', base .. 'levels', 'suspects')
  end
  if left == 0 then
    return true
  end
  left = was
  return false
end

-- Return whether there is something that another consumer could be given now.
local function has_more(base)
  if redis.call('EXISTS', base .. 'ready', base .. 'levels') > 0 then
    return true
  end
  local first = redis.call('ZRANGE', base .. 'delayed', 0, 0, 'WITHSCORES')[2]
  return first and tonumber(first) <= now
end

-- Call a function that may find a key of another type. Return what it returns; nil if it failed.
--
-- What was handed out before has to be returned in any case: the caller makes a call that failed
-- again, with the same receipt numbers. The next call meets the key with nothing in its hands.
local failed = false
local function attempt(what, ...)
  local done, result = pcall(what, ...)
  if done then
    return result
  end
  if #runs == 0 then
    error(result, 0)
  end
  failed = true
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
    alone = alone or attempt(hand_out_suspect, queue)
  end
end
for _, queue in ipairs(order) do
  if left > 0 and ARGV[6] ~= 'suspects' and not failed then
    attempt(hand_out_queue, queue, levels[queue])
  end
end
if left <= 0 then
  -- One token stands for any number of items, and this consumer took it. The items that it leaves
  -- behind are for another consumer, which nobody else wakes.
  for queue = 1, queues do
    if attempt(has_more, KEYS[queue]) then
      notify(KEYS[queue])
    end
  end
end
return { wait and text(math.max(wait, 0)) or '', dropped >= DROPPED and not alone and 1 or 0, runs, text(now) }
