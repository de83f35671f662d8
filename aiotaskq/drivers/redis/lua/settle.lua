-- Apply settlements to items of one queue.
--
-- KEYS  1  the key `cancelled`
--       2  base of the queue
--       3  bases of queues that items go to
-- ARGV  1  time shift
--       2  consumer
--       3  settlements, one after the other: kind, receipt number, and
--            d  done
--            a  again:    which of KEYS it goes to, due or '', item or serial and item
--            x  dead:     reason as JSON, details
--            r  release:  higher numbers first, because each goes to the head of its list
-- Return the receipt numbers that were not held, or false if the consumer was given up and holds
-- none.

local base, held = KEYS[2], KEYS[2] .. 'held:' .. ARGV[2]
local now, gone, at, released = clock(ARGV[1]), {}, 3, false

if not redis.call('ZSCORE', base .. 'consumers', ARGV[2]) then
  return false
end

local words = { d = 2, a = 5, x = 4, r = 2 }

-- Functions by kind of settlement; the item is no longer in `held`.
local apply = {
  d = function() end,
  a = function()
    local target, due, item = KEYS[tonumber(ARGV[at + 2])], ARGV[at + 3], ARGV[at + 4]
    if redis.call('ZSCORE', KEYS[1], id_of(due == '' and item or item_of(item))) then
      return
    end
    place(target, due, item, now)
  end,
  x = function(item)
    add_dead_letter(base, item, ARGV[at + 2], ARGV[at + 3], now)
  end,
  r = function(item)
    give_back(base, item, KEYS[1])
    released = true
  end,
}

-- Return whether an item is to go anywhere. Mostly none is: all are done.
local function moves_items()
  for i = 3, #ARGV, words.d do
    if ARGV[i] ~= 'd' then
      return true
    end
  end
  return false
end

-- One settlement fails as a whole. Of several, some would be applied before another fails, and the
-- same call, made again, would return them as not held.
if #ARGV > 2 + words[ARGV[3]] and moves_items() then
  redis.call('HLEN', held)
  redis.call('ZCARD', KEYS[1])
  check_waiting(base)
  check_dead(base)
  for i = 3, #KEYS do
    check_waiting(KEYS[i])
  end
end

while at <= #ARGV do
  local kind, number, item = ARGV[at], ARGV[at + 1], nil
  if kind ~= 'd' then
    item = redis.call('HGET', held, number)
  end
  if redis.call('HDEL', held, number) == 1 then
    local ok, failure = pcall(apply[kind], item)
    if not ok then -- such as a key of another type; nothing may be lost by that
      redis.call('HSET', held, number, item or '')
      error(failure)
    end
  else
    gone[#gone + 1] = number
  end
  at = at + words[kind]
end
if released then
  notify(base)
end
if #gone > 0 then
  write_for_replicas(base .. 'none')
end
return gone
