-- What was left of a lease that the actor holds: {} for nothing, an empty payload for one that this Redis lost.
-- It stays until it is forgotten or expires: the next holder may need it, too.
-- KEYS[1] = holders, KEYS[2] = partials, KEYS[3] = payload
-- ARGV[1] = actor id, ARGV[2] = lease id
local note = redis.call('HGET', KEYS[2], ARGV[2])
if not note or redis.call('HGET', KEYS[1], ARGV[2]) ~= ARGV[1] then return {} end
local time = redis.call('TIME')
if tonumber(string.match(note, '^%d+')) <= time[1] * 1000 + math.floor(time[2] / 1000) then return {} end
return {redis.call('GET', KEYS[3]) or ''}
