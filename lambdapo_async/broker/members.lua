-- Heartbeats by actor id; expired ones are deleted.
-- KEYS[1] = fleet, KEYS[2] = expiry of its members
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, actor in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
  redis.call('HDEL', KEYS[1], actor)
  redis.call('ZREM', KEYS[2], actor)
end
local actors = redis.call('ZRANGE', KEYS[2], 0, -1)
table.sort(actors)
local heartbeats = {}
for _, actor in ipairs(actors) do
  heartbeats[#heartbeats + 1] = redis.call('HGET', KEYS[1], actor) or nil
end
return heartbeats
