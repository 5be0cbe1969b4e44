-- After a read: whether what was read can be believed. Also the learner's sign of life.
-- A full Redis refuses the sign, and must be read nevertheless: reading is what empties it.
local sign = redis.pcall('HSET', KEYS[1], 'seen', now_ms())
-- A replica refuses it, too: what it holds is not the run any more, or not for long.
if type(sign) == 'table' and sign.err and string.find(sign.err, 'READONLY', 1, true) then return sign end
-- One string travels with the payloads' end; a table would be sent on its own.
return 'OK'
