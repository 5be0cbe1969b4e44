-- Note an actor's heartbeat, and forget those of actors that have gone silent; returns 1 while it is set aside.
-- KEYS[1] = state, KEYS[2] = fleet, KEYS[3] = expiry of its members
-- ARGV[1] = actor id, ARGV[2] = heartbeat, ARGV[3] = actors set aside, which an actor may only read
local lease_ms = tonumber(redis.call('HGET', KEYS[1], 'lease_ms') or '60000')
local now = now_ms()
for _, actor in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
  redis.call('HDEL', KEYS[2], actor)
  redis.call('ZREM', KEYS[3], actor)
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], now + lease_ms, ARGV[1])
return {redis.call('SISMEMBER', ARGV[3], ARGV[1])}
