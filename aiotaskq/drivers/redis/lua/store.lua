-- Store outcomes and tell the subscribers.
--
-- KEYS  a key that never exists; then for each outcome: `<prefix>:result:<id>`, for final ones, and `<prefix>:state:<id>`,
--       for the others
-- ARGV  1  milliseconds until they go, or ''
--       2  channel
--       3  ids of the final ones, in order, as a JSON list
--       4  the same of the outcomes themselves, where they are few and small, or ''
--       5  for each outcome: 1 if it is final, else 0; the outcome as JSON
-- Return the positions of those that were refused, from 1: a final one was there.

local refused, stored, finals, outdated = {}, {}, 0, {}

-- A script that begins by freeing memory is let through by a server that has none left: what has
-- been run can be stored and settled then, and the queue gets shorter.
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
    if set(key, outcome, 'NX') then
      stored[#stored + 1] = finals
      outdated[#outdated + 1] = state
    else
      refused[#refused + 1] = i
    end
  end
end

if #stored > 0 then
  redis.call('DEL', unpack(outdated)) -- in one call: that is a fifth of what storing costs
  local news = ARGV[4] ~= '' and ARGV[4] or ARGV[3]
  if #stored < finals then
    local ids = cjson.decode(ARGV[3])
    for i, final in ipairs(stored) do
      stored[i] = ids[final]
    end
    news = cjson.encode(stored)
  end
  redis.call('PUBLISH', ARGV[2], news)
elseif #refused > 0 then
  touch(KEYS[1])
end
return refused
