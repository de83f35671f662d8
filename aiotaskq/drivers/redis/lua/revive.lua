-- Store envelopes in place of dead letters.
--
-- KEYS  1  base of the queue
--       2  the prefix of the keys that note unique ids, of all queues
--       3  the key `cancelled`
--       4  bases of queues that items go to
-- ARGV  1  time shift
--       2  for each letter: its key, which of KEYS the item goes to, id as it stands in items, id,
--          '1' if it is to be unique or '', due or '', item or serial and item
-- Return the keys of letters that do not exist.

local now, missing = clock(ARGV[1]), {}

-- Half a call, made again, would return the letters that it had revived as missing.
check_dead(KEYS[1])
redis.call('ZCARD', KEYS[3])
for i = 4, #KEYS do
  check_waiting(KEYS[i])
end

for i = 2, #ARGV, 7 do
  local key, packed, id = ARGV[i], ARGV[i + 2], ARGV[i + 3]
  redis.call('HDEL', KEYS[1] .. 'letters', '') -- a deletion first: see allow_when_full()
  if redis.call('ZSCORE', KEYS[1] .. 'dead', key) then
    redis.call('ZREM', KEYS[3], packed)
    if ARGV[i + 4] == '1' then
      redis.call('SET', KEYS[2] .. id, 1, 'EX', UNIQUE_IDS_FOR)
    end
    place(KEYS[tonumber(ARGV[i + 1])], ARGV[i + 5], ARGV[i + 6], now)
    redis.call('HDEL', KEYS[1] .. 'letters', key)
    redis.call('ZREM', KEYS[1] .. 'dead', key)
  else
    missing[#missing + 1] = key
  end
end
return missing
