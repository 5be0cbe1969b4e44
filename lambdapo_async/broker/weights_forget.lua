-- Delete a retired file: its pieces and its manifest.
-- KEYS[1] = state, KEYS[2] = files begun, KEYS[3...] = chunks
-- ARGV[1] = fence, ARGV[2] = name
for i = 3, #KEYS do redis.call('UNLINK', KEYS[i]) end
redis.call('HDEL', KEYS[2], ARGV[2])
return {'OK'}
