-- Rename keys that are of another type than this package gives them, so that scripts and other
-- commands can work again. What was in them stays, under the new name.
--
-- KEYS  keys, or bases of queues, which end with a colon
-- ARGV  1  the ending of the new names
-- Return the keys that were renamed.

local moved = {}

local function check(key, wanted)
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= wanted then
    redis.call('RENAME', key, key .. ':aside:' .. ARGV[1])
    moved[#moved + 1] = key
  end
end

local of_queue = {
  ready = 'list', levels = 'set', delayed = 'zset', consumers = 'zset', fenced = 'zset',
  dead = 'zset', letters = 'hash', wake = 'list', meta = 'hash', parcel = 'hash'
}
local of_prefix = {
  queues = 'set', cancelled = 'zset', schedules = 'hash', due = 'zset', wake = 'list'
}

local function check_queue(base)
  for name, wanted in pairs(of_queue) do
    check(base .. name, wanted)
  end
  for level = 1, 9 do
    check(base .. 'ready:' .. level, 'list')
  end
  check(base .. 'ready:suspects', 'list')
  if redis.call('EXISTS', base .. 'levels') == 0 then -- it tells where there are items
    for _, level in ipairs({ 1, 2, 3, 4, 5, 6, 7, 8, 9, 'suspects' }) do
      if redis.call('EXISTS', base .. 'ready:' .. level) == 1 then
        redis.call('SADD', base .. 'levels', level)
      end
    end
  end
  for _, level in ipairs(redis.call('SMEMBERS', base .. 'levels')) do
    check(base .. 'ready:' .. level, 'list')
  end
  for _, part in ipairs({ 'consumers', 'fenced' }) do
    for _, consumer in ipairs(redis.call('ZRANGE', base .. part, 0, -1)) do
      check(base .. 'held:' .. consumer, 'hash')
      check(base .. 'floor:' .. consumer, 'string')
      check(base .. 'nudge:' .. consumer, 'list')
    end
  end
end

local of_consumer = { held = 'hash', floor = 'string', nudge = 'list' }

for _, key in ipairs(KEYS) do
  local part = of_consumer[string.match(key, '{[^{}]*}:(%l+):.') or '']
  if string.sub(key, -2) == '}:' then -- not the prefix of unique ids, which may have any name
    check_queue(key)
  elseif part then
    check(key, part)
  else
    local wanted = of_prefix[string.match(key, ':(%l+)$') or '']
    if wanted then
      check(key, wanted)
    end
  end
end
return moved
