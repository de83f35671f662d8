-- Store outcomes and notify the subscribers.
--
-- KEYS  1  a key that never exists
--       2  for each outcome: the key of a final outcome, and the key of one that is not final
-- ARGV  1  milliseconds until they expire, or ''
--       2  channel
--       3  ids of the final outcomes, in order, as a JSON list
--       4  the final outcomes themselves as a JSON list, where they are few and small, or ''
--       5  for each outcome: 1 if it is final, else 0; the outcome as JSON
-- Return the positions, from 1, of outcomes that were refused because a final one was there.

local refused, stored, finals, outdated = {}, {}, 0, {}

-- A deletion first: see allow_when_full(). Finished tasks can then be stored and settled, so that
-- the queue gets shorter, on a server that has no memory left.
redis.call('DEL', KEYS[1])

local function set(key, outcome, ...)
  if ARGV[1] == '' then
    return redis.call('SET', key, outcome, ...)
  end
  return redis.call('SET', key, outcome, 'PX', ARGV[1], ...)
end

for i = 1, (#KEYS - 1) / 2 do
  local key, state, outcome = KEYS[2 * i], KEYS[2 * i + 1], ARGV[2 * i + 4]
  if ARGV[2 * i + 3] == '0' then
    if redis.call('EXISTS', key) == 0 then
      set(state, outcome)
    else
      refused[#refused + 1] = i
    end
  else
    finals = finals + 1
    -- A key of another type holds no outcome; another program wrote it.
    local free = set(key, outcome, 'NX')
    if not free and redis.call('TYPE', key).ok ~= 'string' then
      free = set(key, outcome)
    end
    if free then
      stored[#stored + 1] = finals
      outdated[#outdated + 1] = state
    else
      refused[#refused + 1] = i
    end
  end
end

if #stored > 0 then
  redis.call('DEL', unpack(outdated)) -- in one call, which makes storing notably faster
  local published = ARGV[4] ~= '' and ARGV[4] or ARGV[3]
  if #stored < finals then
    local ids = cjson.decode(ARGV[3])
    for i, final in ipairs(stored) do
      stored[i] = ids[final]
    end
    published = cjson.encode(stored)
  end
  redis.call('PUBLISH', ARGV[2], published)
elseif #refused > 0 then
  write_for_replicas(KEYS[1])
end
return refused
