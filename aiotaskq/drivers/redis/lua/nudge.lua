-- Have a consumer's own wait for a token end now: something has fallen due.
--
-- The server ends a wait whose time is over when it next looks, which may be a tenth of a second
-- later. What nobody waits for any more is gone in a minute.
--
-- KEYS  1  the list `nudge:<consumer>`

redis.call('DEL', KEYS[1]) -- as in relieve(); and there is never more than one
redis.call('RPUSH', KEYS[1], 1)
redis.call('EXPIRE', KEYS[1], 60)
return 1
