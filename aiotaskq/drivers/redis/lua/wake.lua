-- End one consumer's wait for a token now, because an item has fallen due.
--
-- A server ends a wait that is over only when it next looks at its timers, which may be a tenth
-- of a second late. A token for a consumer that waits no more expires after a minute.
--
-- KEYS  1  the list `nudge:<consumer>`
-- Return 1.

redis.call('DEL', KEYS[1]) -- a deletion first: see allow_when_full(). So there is one token at most
redis.call('RPUSH', KEYS[1], 1)
redis.call('EXPIRE', KEYS[1], 60)
return 1
