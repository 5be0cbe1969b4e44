-- Delete a closed version: its pieces and its name.
-- KEYS[1] = state, KEYS[2] = versions, KEYS[3...] = manifest and chunks
-- ARGV[1] = fence, ARGV[2] = version
for i = 3, #KEYS do redis.call('UNLINK', KEYS[i]) end
redis.call('ZREM', KEYS[2], ARGV[2])
return {'OK'}
