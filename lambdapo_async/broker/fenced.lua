-- Prelude of every script of the learner. KEYS[1] = state, ARGV[1] = fence of the caller
local stored_fence = redis.call('HGET', KEYS[1], 'fence')
if not stored_fence then return {'GONE'} end
if tonumber(stored_fence) < tonumber(ARGV[1]) then return {'LOST', 'it went back to an older learner'} end
if stored_fence ~= ARGV[1] then return {'FENCED', stored_fence} end
