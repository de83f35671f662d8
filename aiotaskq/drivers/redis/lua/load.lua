-- Read schedules.
--
-- KEYS  1  schedules
--       2  schedules by due time
-- ARGV  ids
-- Return for each schedule that exists: id, due time or '', the value stored under the id.

local found = {}

for _, id in ipairs(ARGV) do
  local stored = redis.call('HGET', KEYS[1], id)
  if stored then
    found[#found + 1] = id
    found[#found + 1] = redis.call('ZSCORE', KEYS[2], id) or ''
    found[#found + 1] = stored
  end
end
return found
