-- KEYS[1] = state, KEYS[2] = actors set aside
-- ARGV[1] = fence, ARGV[2...] = actor ids
for i = 2, #ARGV do redis.call('SREM', KEYS[2], ARGV[i]) end
return {'OK'}
