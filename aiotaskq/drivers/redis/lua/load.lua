-- Read schedules.
--
-- KEYS  1  schedules
--       2  the same by due time
-- ARGV  ids
-- Return for each that is there: id, due time or '', what is kept under the id.

local found = {}

for _, id in ipairs(ARGV) do
  local kept = redis.call('HGET', KEYS[1], id)
  if kept then
    found[#found + 1] = id
    found[#found + 1] = redis.call('ZSCORE', KEYS[2], id) or ''
    found[#found + 1] = kept
  end
end
return found
