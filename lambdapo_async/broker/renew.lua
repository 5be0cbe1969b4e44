-- Push the expiry of leases that the actor still holds; returns the others.
-- KEYS[1] = state, KEYS[2] = leases, KEYS[3] = holders
-- ARGV[1] = actor id, ARGV[2...] = lease ids
local lease_ms = tonumber(redis.call('HGET', KEYS[1], 'lease_ms') or '0')
local time = redis.call('TIME')
local expiry = time[1] * 1000 + math.floor(time[2] / 1000) + lease_ms
local lost = {}
for i = 2, #ARGV do
  if redis.call('HGET', KEYS[3], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[2], expiry, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
