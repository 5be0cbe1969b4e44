-- After a read: whether what was read can be believed. Also the learner's sign of life.
-- A full Redis refuses the sign, and must be read nevertheless: reading is what empties it.
redis.pcall('HSET', KEYS[1], 'seen', now_ms())
-- One string travels with the payloads' end; a table would be sent on its own.
return 'OK'
