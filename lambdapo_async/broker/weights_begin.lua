-- Announce a version before its first chunk, so that a crash leaves nothing that nobody would delete.
-- KEYS[1] = state, KEYS[2] = head, KEYS[3] = versions
-- ARGV[1] = fence, ARGV[2] = version, ARGV[3] = number of chunks
local head = redis.call('GET', KEYS[2])
if head and tonumber(head) >= tonumber(ARGV[2]) then return {'OLD', head} end
local before = math.abs(tonumber(redis.call('ZSCORE', KEYS[3], ARGV[2]) or '0'))
redis.call('ZADD', KEYS[3], math.max(before, tonumber(ARGV[3])), ARGV[2])
return {'OK'}
