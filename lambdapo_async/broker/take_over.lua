-- A learner makes the run its own: the fence rises, a foreign owner of the same fence is refused.
-- KEYS[1] = state
-- ARGV[1] = fence, ARGV[2] = owner token, ARGV[3] = epoch to set if there is none, ARGV[4...] = field, value, ...
local fence, owner = tonumber(ARGV[1]), ARGV[2]
local stored = redis.call('HMGET', KEYS[1], 'fence', 'owner')
if stored[1] then
  local stored_fence = tonumber(stored[1])
  if stored_fence > fence or (stored_fence == fence and stored[2] ~= owner) then
    return {'FENCED', stored[1]}
  end
end
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'owner', owner, 'seen', now_ms())
redis.call('HSETNX', KEYS[1], 'epoch', ARGV[3])
for i = 4, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return {'OK', redis.call('HGET', KEYS[1], 'epoch')}
