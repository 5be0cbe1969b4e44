-- Push the expiry of leases that the actor still holds; returns the others.
-- A server that has restarted may know too little: nothing is lost before its learner came back to it.
-- KEYS[1] = state, KEYS[2] = leases, KEYS[3] = holders
-- ARGV[1] = actor id, ARGV[2...] = lease ids
local state = redis.call('HMGET', KEYS[1], 'server', 'lease_ms')
if state[1] ~= server_id() then return {} end
local expiry = now_ms() + tonumber(state[2])
local lost = {}
for i = 2, #ARGV do
  if redis.call('HGET', KEYS[3], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[2], expiry, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
