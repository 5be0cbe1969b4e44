-- Heartbeats by actor id, without those that have expired.
-- The learner may only read them; since a script's KEYS count as written, they come as arguments.
-- ARGV[1] = fleet, ARGV[2] = expiry of its members
local actors = redis.call('ZRANGEBYSCORE', ARGV[2], now_ms(), '+inf')
table.sort(actors)
local heartbeats = {}
for _, actor in ipairs(actors) do
  heartbeats[#heartbeats + 1] = redis.call('HGET', ARGV[1], actor) or nil
end
return heartbeats
