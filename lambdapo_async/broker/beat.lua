-- Returns 1 while the actor is set aside.
-- KEYS[1] = state, KEYS[2] = fleet, KEYS[3] = expiry of its members, KEYS[4] = actors set aside
-- ARGV[1] = actor id, ARGV[2] = heartbeat
local lease_ms = tonumber(redis.call('HGET', KEYS[1], 'lease_ms') or '60000')
local time = redis.call('TIME')
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], time[1] * 1000 + math.floor(time[2] / 1000) + lease_ms, ARGV[1])
return {redis.call('SISMEMBER', KEYS[4], ARGV[1])}
